"""`dtrain bench overhead`: the trainer, end to end through its reader, against a bare loop on resident data."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from dtrain.run.rundir import read_rows
from dtrain_bench.ratios import ratios, show

BATCH, WARMUP = 128, 4


def trainer_rate(steps: int, threads: int) -> float:
    """Images per CPU-second of a real training run on synthetic images, between its first and its last log row."""
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        output = Path(folder) / "run"
        flags = "--arch allcnn_c --arch-opt norm=batch --recipe none --dataset synthetic --flip --shift 2 --cutout 8"
        flags += f" --lr 0.01 --batch-size {BATCH} --steps {WARMUP + steps} --threads {threads} --output {output}"
        flags += f" --log-interval {WARMUP} --eval-every end --checkpoint-every end"
        command = [sys.executable, "-m", "dtrain", "train", *flags.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [row for row in read_rows(output) if row["kind"] == "train"]
        images = rows[-1]["samples"] - rows[0]["samples"]
        return float(images / (rows[-1]["clock"]["cpu_seconds"] - rows[0]["clock"]["cpu_seconds"]))


def bare_rate(steps: int, threads: int) -> float:
    """Images per CPU-second of the bare loop."""
    command = [sys.executable, "-m", "dtrain_bench.bare", *map(str, (BATCH, steps, WARMUP, threads))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(*, quick: bool, as_json: bool) -> None:
    """Measure and print. quick: three short turns, to see that it runs."""
    turns, steps = (3, 8) if quick else (9, 40)
    results = {"one process": ratios(lambda: trainer_rate(steps, 1), lambda: bare_rate(steps, 1), turns=turns)}
    show("overhead", results, "images per CPU-second", as_json=as_json)
