"""One step of a run, computed again: with the bits of the run, its pictures, and nothing written into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from warm import Result, Warm

from dtrain.run import checkpoint

SMALL = f"{Path(__file__).with_name('small_network.py')}:small"  # batch norm and dropout
STEPS = 6


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def train(ranks: Warm, run: Path, cache: Path, *more: object, world: int) -> None:
    flags = ["--arch", SMALL, "--dataset", "digits", "--recipe", "none", "--steps", STEPS, "--batch-size", 48, "--flip"]
    flags += ["--lr", "0.1", "--grad-accum-steps", 2, "--ema", "0.9", "--clip-grad", 1, "--shift", 2, "--threads", 1]
    flags += ["--amp-dtype", "float32", "--loader", "memory", "--log-interval", 1, "--eval-every", "end"]
    flags += ["--checkpoint-every", "3steps", "--keep", 1, "--cache-dir", cache, "--output", run]
    assert {result.code for result in ranks([*flags, *more], world=world)} == {0}


def replayed(ranks: Warm, run: Path, step: int, *flags: object) -> Result:
    return ranks(["replay", run, "--step", step, "--out", run.with_name(f"pictures-{step}"), *flags], world=1)[0]


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_step_of_one_process_is_computed_again_bit_for_bit_and_writes_nothing_into_the_run(
    ranks: Warm, tmp_path: Path, cache: Path
) -> None:
    run = tmp_path / "run"
    train(ranks, run, cache, world=1)
    before = files_of(run)
    result = replayed(ranks, run, STEPS, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["checkpoint"] == "step-00000003"  # two steps lie between
    assert found["digest_after"] == checkpoint.digest(
        checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}").parts["network"]
    )
    assert found["loss"] == pytest.approx(losses(run)[STEPS], abs=2**-20)
    worst = [row["loss"] for row in found["worst"]]
    assert worst == sorted(worst, reverse=True)
    assert len(worst) == 10
    heights = []
    for path in found["pictures"]:
        with Image.open(path) as picture:
            heights.append(picture.size[1])
    assert 2 * 128 < heights[0] < heights[1] > 6 * 128  # two rows of eight, and six
    assert files_of(run) == before

    text = replayed(ranks, run, STEPS).out
    assert f"step {STEPS} of {run}, computed from step-00000003\n" in text
    assert f"loss {worst[0]:.6g}" in text
    far = replayed(ranks, run, 3)  # --keep 1 has left no step before it
    assert (far.code, far.err.count("\n")) == (2, 1)
    assert "--step 3: no sound checkpoint before it is left, the oldest is of step 3" in far.err
    assert replayed(ranks, run, STEPS + 1).err.startswith("error: --step 7: this run has the steps 1 to 6")
    inside = ranks(["replay", run, "--step", STEPS, "--out", run / "x"], world=1)[0]
    assert inside.err.startswith(f"error: --out {run / 'x'}: lies in the run")


@pytest.mark.dist
@pytest.mark.parametrize(("world", "batch"), [pytest.param(2, 48, marks=pytest.mark.slow), (3, 50)])
def test_a_step_of_several_processes_is_computed_again_by_one_up_to_rounding(
    ranks: Warm, tmp_path: Path, cache: Path, world: int, batch: int
) -> None:
    run = tmp_path / "run"
    train(ranks, run, cache, "--batch-size", batch, world=world)
    result = replayed(ranks, run, STEPS, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["processes"] == world
    # with the other process's dropout it would be off by a tenth
    assert found["loss"] == pytest.approx(losses(run)[STEPS], abs=1e-4)
    assert f"{world} processes one after the other, so rounding may differ" in replayed(ranks, run, STEPS).out


def test_a_step_is_replayed_on_the_processes_that_made_it(ranks: Warm, tmp_path: Path, cache: Path) -> None:
    run = tmp_path / "run"
    train(ranks, run, cache, "--keep", 9, world=2)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    train(ranks, run, cache, "--keep", 9, world=1)  # goes on at step 3
    for step, processes in ((3, 2), (4, 1)):
        result = replayed(ranks, run, step, "--json")
        assert json.loads(result.out)["processes"] == processes
