"""The benchmarks compare turn and turn about, and run as told. No figure is judged here: these machines are shared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dtrain_bench.contenders.meter import tree_cpu_seconds
from dtrain_bench.contenders.networks import small
from dtrain_bench.peers import table
from dtrain_bench.ratios import compared, ratios
from torch.utils.flop_counter import FlopCounterMode
from warm import Warm


def test_ratios_are_of_pairs_and_the_order_of_a_pair_alternates() -> None:
    order: list[str] = []
    ours, theirs = iter([2.0, 9.0, 4.0, 8.0, 5.0]), iter([2.0, 3.0, 2.0, 2.0, 1.0])

    def first() -> float:
        order.append("ours")
        return next(ours)

    def second() -> float:
        order.append("theirs")
        return next(theirs)

    result = ratios(first, second, turns=5)  # pairs: 1, 3, 2, 4, 5
    assert (result["ratio_median"], result["ratio_range"], result["turns"]) == (3.0, [1.0, 5.0], 5)
    assert (result["ours"], result["theirs"]) == (5.0, 2.0)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours", "ours", "theirs"]


@pytest.mark.slow
def test_bench_loaders_measures_every_reader_and_names_the_machine(ranks: Warm) -> None:
    result = ranks(["bench", "loaders", "--quick", "--json"], world=1)[0]
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert {"memory"} <= set(record["results"]) <= {"memory", "ffcv"}
    assert all(one["ours"] > 0 and one["theirs"] > 0 for one in record["results"].values())
    assert {"processor", "cores", "torch", "numpy"} <= set(record["machine"])


@pytest.mark.slow
def test_bench_overhead_measures_one_process_and_two(ranks: Warm) -> None:
    result = ranks(["bench", "overhead", "--quick", "--json"], world=1, timeout=280)[0]
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert set(record["results"]) == {"one process", "two processes"}
    assert all(one["turns"] == 2 and one["ours"] > 0 for one in record["results"].values())


# -- peers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """What a contender is told: two steps on 512 gray images, one gray a class."""
    labels = np.arange(512) % 10
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None] * 20 + 40, (512, 32, 32, 3))
    np.savez(tmp_path / "images.npz", images=images, labels=labels, mean=[0.5] * 3, std=[0.25] * 3)
    facts = {"data": str(tmp_path / "images.npz"), "network": "small", "tuned": False, "bf16": False}
    return {**facts, "warmup": 1, "steps": 2}


def run_contender(module: str, task: dict[str, Any], folder: Path) -> dict[str, float]:
    words = [sys.executable, "-m", f"dtrain_bench.contenders.{module}", json.dumps(task)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def looks_right(rates: dict[str, float]) -> bool:
    """More images a second than none, and the loss of a network of ten classes that has just begun."""
    return (
        rates["images_per_second"] > 0 and rates["images_per_cpu_second"] > 0 and abs(rates["loss"] - math.log(10)) < 1
    )


def test_plain_pytorch_runs_as_the_benchmark_starts_it(task: dict[str, Any], tmp_path: Path) -> None:
    assert looks_right(run_contender("plain_pytorch", task, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_the_contenders_of_one_form_do_the_same_work(
    package: str, tuned: bool, task: dict[str, Any], tmp_path: Path
) -> None:
    form = {**task, "tuned": tuned, "bf16": tuned, "steps": 6}  # on into a second epoch
    plain, other = (run_contender(module, form, tmp_path) for module in ("plain_pytorch", f"with_{package}"))
    assert looks_right(other)
    assert other["loss"] == pytest.approx(plain["loss"], abs=1e-3)


@pytest.mark.slow
def test_bench_peers_compares_dtrain_with_each_form_of_the_others(ranks: Warm, tmp_path: Path) -> None:
    words = ["bench", "peers", "--quick", "--network", "small", "--json", "--data-dir", tmp_path]
    result = ranks(words, world=1, timeout=280)[0]
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["data"] == "synthetic, 2,000 images"
    one = record["results"]["small"]
    peers = ("plain PyTorch", "Lightning", "Accelerate")
    assert set(one["ratios"]) == {f"{peer}, {form}" for peer in peers for form in ("defaults", "tuned")}
    assert set(one["rates"]) == {"dtrain", *one["ratios"]}
    assert table(record).count("\n") == 1 + len(one["rates"])


def test_bench_peers_refuses_what_it_cannot_do(ranks: Warm) -> None:
    for words, told in ((["--network", "smal"], "small"), (["--turns", "0"], "--turns 0")):
        result = ranks(["bench", "peers", *words], world=1)[0]
        assert (result.code, told in result.err) == (2, True)


def test_the_small_network_is_as_small_as_it_says() -> None:
    import torch

    with FlopCounterMode(display=False) as counted:
        small(10)(torch.zeros(1, 3, 32, 32))
    # out height x width x channels x in channels x 9, for both convolutions, and the linear layer
    assert counted.get_total_flops() / 2 == 16 * 16 * 8 * 3 * 9 + 8 * 8 * 16 * 8 * 9 + 16 * 10 == 129_184


@pytest.mark.parametrize("tuned", [False, True])
def test_a_contender_shifts_and_flips_like_dtrain(tuned: bool, tmp_path: Path) -> None:
    from dtrain_bench.contenders.task import Images, Task

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images=picture[None], labels=[3], mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    images = Images(Task(str(tmp_path / "one.npz"), "small", tuned, False, 1, 1))
    padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)))  # black outside, up to 4 pixels each way, then mirrored or not
    shifted = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    possible = np.stack([*shifted, *(one[:, ::-1] for one in shifted)])
    seen = set()
    for _ in range(40):
        tensor, label = images[0]
        pixels = (tensor.numpy().transpose(1, 2, 0) * [0.2, 0.3, 0.4] + [0.5, 0.4, 0.3]) * 255
        (which,) = np.flatnonzero((possible == pixels.round().astype(np.uint8)).all((1, 2, 3)))
        assert label == 3
        seen.add(which)
    assert min(seen) < 81 <= max(seen)  # both directions
    assert len(seen) > 20


def test_processor_time_is_of_the_whole_tree_and_of_those_who_have_ended() -> None:
    text = "import os, time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    worker = [sys.executable, "-c", text]
    parent = (
        f"import subprocess, sys; subprocess.run({worker!r}, stdin=0, stdout=1); print('ended', flush=True); input()"
    )
    before = tree_cpu_seconds(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "done\n"
        assert tree_cpu_seconds(process.pid) >= 0.29  # the worker lives
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"
        assert 0.29 <= tree_cpu_seconds(process.pid) < 2.0  # and has been waited for
        assert tree_cpu_seconds(os.getpid()) - before >= 0.29
        process.stdin.write("\n")


def test_the_table_shows_each_contender_once_with_its_ratio() -> None:
    def rates(*values: float) -> dict[str, list[float]]:
        return {"images_per_second": list(values), "images_per_cpu_second": [v / 2 for v in values]}

    ratio = compared([(1000.0, 500.0), (1200.0, 400.0), (900.0, 600.0)])  # 2, 3 and 1.5
    one = {"rates": {"dtrain": rates(1000, 1200, 900), "other, tuned": rates(500, 400, 600)}}
    record = {"data": "some", "batch_size": 128, "results": {"small": {**one, "ratios": {"other, tuned": ratio}}}}
    assert table(record).splitlines() == [
        "| some, batch 128 | small: images/s | dtrain against it | images per CPU-second |",
        "| --- | --- | --- | --- |",
        "| dtrain | 1,000 |  | 500 |",
        "| other, tuned | 500 | **2.00** [1.50, 3.00] | 250 |",
    ]
