"""`dtrain bench peers`: compares a training run of dtrain with plain PyTorch, Lightning and Accelerate, in two forms.

All have the same network, batch size, images, augmentation and optimizer, and data loading is included. A turn runs
each of them once, in a process of its own, and gives the ratio of dtrain to each other; the next turn has the opposite
order. `python -m dtrain_bench.peers < benchmarks/results/peers.json` prints the table of the README.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.commands.data import convert
from dtrain.data.beton import Beton
from dtrain.data.sources import locate
from dtrain.errors import DataError, UsageError, nearest
from dtrain.run.console import Console
from dtrain.run.rows import TrainRow
from dtrain.run.rundir import read_rows
from dtrain.runtime import decide
from dtrain.settings.data import Data as DataSettings
from dtrain.settings.machine import Machine
from dtrain_bench.processes import output_of
from dtrain_bench.ratios import compared, machine

OURS = "dtrain"
PEERS = {  # name: (module in contenders/, the package that it needs)
    "plain PyTorch": ("plain_pytorch", "torch"),
    "Lightning": ("with_lightning", "lightning"),
    "Accelerate": ("with_accelerate", "accelerate"),
}
DISTRIBUTIONS = ("torchvision", "pillow", "ffcv", "lightning", "accelerate")
BATCH_SIZE, SHIFT = 128, 4  # equal to those of contenders/task.py, which is not imported because it needs torchvision
# (warm-up steps, timed steps): about 7 s on the machine of the records, and 15 minutes in all
STEPS = {
    "allcnn_c": {OURS: (3, 14), "tuned": (3, 12), "defaults": (2, 6)},
    "small": {OURS: (50, 500), "tuned": (20, 200), "defaults": (20, 160)},
}
NETWORKS = {  # name: the flags that choose it in dtrain
    "allcnn_c": ["--arch", "allcnn_c", "--arch-opt", "norm=batch"],
    "small": ["--arch", f"{Path(__file__).with_name('contenders') / 'networks.py'}:small"],
}
EPOCH = 50_000  # the least images in an epoch of the other trainers; as many as CIFAR-10 has


@dataclass(frozen=True)
class Contender:
    """One trainer in the comparison. name: "dtrain" or a key of PEERS; form: "defaults" or "tuned"."""

    name: str
    form: str

    def __str__(self) -> str:
        return self.name if self.name == OURS else f"{self.name}, {self.form}"


@dataclass(frozen=True)
class Data:
    """The training images. name, data_dir: for dtrain; file: an .npz with the same images, for the others."""

    name: str
    data_dir: Path
    file: Path
    images: int


def write_images(beton: Beton, file: Path) -> None:
    """Write the images of a beton to an .npz file, repeated until there are at least EPOCH.

    So the other trainers rarely have to start an epoch, which is slow for them, even if the data set is small.
    """
    flat, size = np.memmap(beton.path, np.uint8, "r"), beton.image_size
    at = beton.pixel_offsets.astype(np.int64)[:, None] + np.arange(size * size * 3)[None, :]
    images = flat[at].reshape(-1, size, size, 3)
    times = -(-EPOCH // len(images))
    labels = np.tile(beton.labels, times)
    np.savez(file, images=np.tile(images, (times, 1, 1, 1)), labels=labels, mean=beton.mean, std=beton.std)


def prepare_data(data_dir: Path, folder: Path) -> Data:
    """Take CIFAR-10 if it is in `data_dir`, else the synthetic set. Convert it for dtrain, write it for the others."""
    name = "cifar10"
    try:
        locate(name, data_dir, {"download": "false"})
    except DataError:
        name = "synthetic"
    beton = Console(False).converting(convert(DataSettings(dataset=name, data_dir=data_dir)))["train"]
    write_images(beton, folder / "images.npz")
    return Data(name, data_dir, folder / "images.npz", len(beton.labels))


def measured(contender: Contender, network: str, data: Data, quick: bool, bf16: bool) -> dict[str, float]:
    """Run one trainer in a process of its own; returns images per second and per CPU-second, and the mean loss."""
    warmup, steps = STEPS[network][OURS if contender.name == OURS else contender.form]
    if quick:
        steps = max(2, steps // 5)
    # each library chooses its own number of threads, whatever the shell of the user has set
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as name:
        folder = Path(name)
        if contender.name == OURS:
            return _of_dtrain(network, data, warmup, steps, folder, environment)
        module, _ = PEERS[contender.name]
        tuned = contender.form == "tuned"
        task = {"data": str(data.file), "network": network, "tuned": tuned, "bf16": tuned and bf16}
        told = json.dumps({**task, "warmup": warmup, "steps": steps})
        out = output_of(
            [sys.executable, "-m", f"dtrain_bench.contenders.{module}", told], folder=folder, environment=environment
        )
        rates: dict[str, float] = json.loads(out.splitlines()[-1])
        return rates


def _of_dtrain(
    network: str, data: Data, warmup: int, steps: int, folder: Path, environment: Mapping[str, str]
) -> dict[str, float]:
    """Run `dtrain train` as a user would; the figures are from its first to its last log row.

    Its loader has threads and no processes, so the CPU time in the rows is that of the whole run.
    """
    flags = f"--recipe none --dataset {data.name} --device cpu --flip --shift {SHIFT}"
    flags += f" --batch-size {BATCH_SIZE} --steps {warmup + steps} --log-interval {warmup}"
    flags += " --opt sgd --lr 0.05 --momentum 0.9 --nesterov --weight-decay 5e-4 --schedule constant"
    # evaluation and saving come after the last row, so they are not timed; the other trainers do neither
    flags += " --val-split 0.01 --eval-every end --checkpoint-every end"
    command = [sys.executable, "-m", "dtrain", "train", *NETWORKS[network], *flags.split()]
    command += ["--data-dir", str(data.data_dir.absolute()), "--output", str(folder / "run")]
    output_of(command, folder=folder, environment=environment)
    first, *rows = [row for row in read_rows(folder / "run") if isinstance(row, TrainRow)]
    images = rows[-1].samples - first.samples
    began, ended = first.clock, rows[-1].clock
    return {
        "images_per_second": images / (ended.time - began.time),
        "images_per_cpu_second": images / (ended.cpu_seconds - began.cpu_seconds),
        "loss": sum(row.loss * row.images_in_interval for row in rows) / images,
    }


def turns_of(
    network: str, contenders: Sequence[Contender], data: Data, *, turns: int, quick: bool, bf16: bool
) -> dict[str, Any]:
    """Run all trainers `turns` times, every second turn in the opposite order.

    Returns `rates`, the values of each trainer in each turn, and `ratios`, dtrain's images per second over the others'.
    """
    rates: dict[str, dict[str, list[float]]] = {str(c): {} for c in contenders}
    for turn in range(turns):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            once = measured(contender, network, data, quick, bf16)
            print(
                f"{network}, turn {turn + 1} of {turns}: {contender}, {once['images_per_second']:,.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
            for name, value in once.items():
                rates[str(contender)].setdefault(name, []).append(value)
    ours = rates[OURS]["images_per_second"]
    ratios = {
        name: compared(list(zip(ours, theirs["images_per_second"], strict=True)))
        for name, theirs in rates.items()
        if name != OURS
    }
    return {"rates": rates, "ratios": ratios}


def table(record: Mapping[str, Any]) -> str:
    """A record as the Markdown table of the README."""
    networks = record["results"]
    head = [f"{record['data']}, batch {record['batch_size']}"]
    for network in networks:
        head += [f"{network}: images/s", "dtrain against it", "images per CPU-second"]
    rows = [head, ["---"] * len(head)]
    for name in next(iter(networks.values()))["rates"]:
        row = [name]
        for result in networks.values():
            rates, ratio = result["rates"][name], result["ratios"].get(name)
            row.append(f"{statistics.median(rates['images_per_second']):,.0f}")
            if ratio is None:
                row.append("")
            else:
                low, high = ratio["ratio_range"]
                row.append(f"**{ratio['ratio_median']:.2f}** [{low:.2f}, {high:.2f}]")
            row.append(f"{statistics.median(rates['images_per_cpu_second']):,.0f}")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _contenders() -> list[Contender]:
    """dtrain, and both forms of each other trainer that is installed. Prints which are not."""
    found = [Contender(OURS, "tuned")]
    for name, (_, package) in PEERS.items():
        if find_spec(package) is None:
            print(f"{name} is left out: {package} is not installed; pip install 'dtrain[bench]'", file=sys.stderr)
        else:
            found += [Contender(name, "defaults"), Contender(name, "tuned")]
    return found


def main(*, networks: Sequence[str], turns: int, data_dir: Path, quick: bool, as_json: bool) -> None:
    """Measure and print. quick: one turn with a fifth of the steps, to try it out. Raises UsageError."""
    if turns < 1:
        raise UsageError(f"--turns {turns}: give 1 or more")
    for network in networks:
        if network not in NETWORKS:
            raise UsageError(f"--network {network}: not a choice; {nearest(network, list(NETWORKS))}")
    here = machine()
    versions = {name: metadata.version(name) for name in DISTRIBUTIONS if find_spec(name.replace("pillow", "PIL"))}
    config = Machine(device="cpu")
    bf16 = decide(config, local_rank=0, local_world=1).amp_dtype == "bfloat16"
    contenders, turns = _contenders(), 1 if quick else turns
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        data = prepare_data(data_dir, Path(folder))
        results = {
            network: turns_of(network, contenders, data, turns=turns, quick=quick, bf16=bf16) for network in networks
        }
    record = {
        "benchmark": "peers",
        "unit": "images per second of real time, loaders included",
        "machine": {**here, **versions, "load_average_after": os.getloadavg()[0]},
        "data": f"{data.name}, {data.images:,} images",
        "batch_size": BATCH_SIZE,
        "tuned_in": "bfloat16" if bf16 else "float32",
        "turns": turns,
        "results": results,
    }
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        print(f"peers, {turns} turns, tuned in {record['tuned_in']}; {record['machine']}\n\n{table(record)}")


if __name__ == "__main__":
    print(table(json.load(sys.stdin)))
