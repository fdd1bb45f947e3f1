"""The promise of the project: a run stopped after any step and gone on with ends with the bits of the unbroken one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

STEPS = 6
STOPS = range(1, STEPS)
OPTIMIZERS = [
    ("sgd", True),
    ("sgd", False),
    ("adam", True),
    ("adam", False),
    ("adamw", True),
    ("adamw", False),
    ("muon", False),
]


def runs(
    folder: Path,
    cache: Path,
    optimizer: str,
    fused: bool,
    more: dict[str, Any],
    todo: Sequence[tuple[str, int | None]],
) -> dict[str, dict[str, str]]:
    """One rank of some short runs, one after the other: (name of the directory, step to stop after).

    On a network with batch norm and dropout, with accumulation 2, EMA, channels-last. more: other settings. Returns
    the digests of those that came to their end.
    """
    from dtrain.commands.prove import digests
    from dtrain.errors import Stopped
    from dtrain.settings.config import TrainConfig
    from dtrain.training import train
    from dtrain.world import place

    ended = {}
    for name, stop_after in todo:
        settings: dict[str, Any] = dict(
            arch=f"{Path(__file__).with_name('small_network.py')}:small",
            dataset="digits",
            recipe="none",
            opt=optimizer,
            opt_opt=None if optimizer == "muon" else [f"fused={'true' if fused else 'false'}"],
            lr=0.01,
            batch_size=48,
            steps=STEPS,
            warmup_epochs=0.05,
            grad_accum_steps=2,
            ema=0.9,
            smoothing=0.1,
            flip=True,
            shift=2,
            cutout=4,
            eval_every="2steps",
            eval_batch_size=100,
            log_interval=3,
            checkpoint_every="end",
            loader="memory",
            threads=1,
            cache_dir=cache,
            output=folder / name,
        )
        try:
            train(TrainConfig.of(**{**settings, **more}), stop_after=stop_after)
        except Stopped as stopped:
            assert f"at step {stop_after} " in str(stopped)
            continue
        assert stop_after is None
        if place().is_main:
            ended[name] = digests(folder / name)
    return ended


class Runs:
    """Short runs of one optimizer in `world` fresh processes, started by `go`."""

    def __init__(
        self, ranks: Warm, folder: Path, cache: Path, optimizer: str, fused: bool, more: dict[str, Any] | None = None
    ) -> None:
        self._ranks, self._folder = ranks, folder
        self._about = {"folder": folder, "cache": cache, "optimizer": optimizer, "fused": fused, "more": more or {}}

    def go(self, world: int, todo: Sequence[tuple[str, int | None]], timeout: float = 60) -> dict[str, dict[str, str]]:
        kwargs = {**self._about, "todo": list(todo)}
        ended: dict[str, dict[str, str]] = self._ranks.call("test_resume:runs", world, kwargs, timeout=timeout)[0]
        return ended


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def combinations() -> list[Any]:
    """Every optimizer on 1, 2 and 4 processes: alone all of them, together one each; the slow suite has the others."""
    at_once = {(2, "sgd", True)}
    return [
        pytest.param(*of, world, marks=[] if world == 1 or (world, *of) in at_once else [pytest.mark.slow])
        for world in (1, 2, 4)
        for of in OPTIMIZERS
    ]


@pytest.mark.dist
@pytest.mark.parametrize(("optimizer", "fused", "world"), combinations())
def test_stopped_after_any_step_and_resumed_ends_with_the_same_bits(
    ranks: Warm, tmp_path: Path, cache: Path, optimizer: str, fused: bool, world: int
) -> None:
    some = Runs(ranks, tmp_path, cache, optimizer, fused)
    straight = some.go(world, [("straight", None), *((f"at-{k}", k) for k in STOPS)])["straight"]
    assert straight["step"] == str(STEPS)
    assert straight.keys() == {"step", "network", "optimizer", "ema", "rows"}
    resumed = some.go(world, [(f"at-{k}", None) for k in STOPS])  # in other processes: nothing but files goes over
    assert resumed == {f"at-{k}": straight for k in STOPS}


# epochs of two steps, two steps and five: the sizes change after steps 2 and 4
STAGED = {
    "batch": {"batch_size": "480,701@1,240@2"},
    "image": {"batch_size": "480,701@1,240@2", "image_size": "16,24@1,32@2"},
}


@pytest.mark.dist
@pytest.mark.parametrize("what", [pytest.param("batch", marks=pytest.mark.slow), "image"])  # the latter changes both
@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_sizes_that_change_at_epochs_change_again_after_a_stop_before_at_or_after_the_change(
    ranks: Warm, tmp_path: Path, cache: Path, what: str, world: int
) -> None:
    from dtrain.run.rows import comparable
    from dtrain.run.rundir import read_rows

    more = {**STAGED[what], "log_interval": 1, "eval_every": "1epoch"}
    some = Runs(ranks, tmp_path, cache, "sgd", True, more)
    straight = some.go(world, [("straight", None), *((f"at-{k}", k) for k in STOPS)])["straight"]
    assert some.go(world, [(f"at-{k}", None) for k in STOPS]) == {f"at-{k}": straight for k in STOPS}
    rows = comparable(read_rows(tmp_path / "straight"))
    seen = [(row["step"], row["epoch"], row["samples"]) for row in rows if row["kind"] == "train"]
    assert seen == [(1, 0.5, 480), (2, 1, 960), (3, 1.5, 1661), (4, 2, 2362), (5, 2.2, 2602), (6, 2.4, 2842)]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 2, 4, 4, 6, 6]  # raw weights and EMA


def test_a_batch_norm_that_the_builder_froze_stays_frozen_over_evaluations_and_stops(
    ranks: Warm, tmp_path: Path, cache: Path
) -> None:
    import torch

    from dtrain import load_network

    network = f"{Path(__file__).with_name('small_network.py')}:frozen_norm"
    some = Runs(ranks, tmp_path, cache, "sgd", True, {"arch": network})  # evaluates after steps 2, 4 and 6
    straight = some.go(1, [("straight", None), ("at-1", 1), ("at-3", 3), ("at-5", 5)])["straight"]
    resumed = some.go(1, [("at-1", None), ("at-3", None), ("at-5", None)])
    assert resumed == {"at-1": straight, "at-3": straight, "at-5": straight}
    ended = load_network(tmp_path / "straight")
    assert torch.equal(ended[1].running_mean, torch.zeros(8))  # as batch norm begins
    assert not torch.equal(ended[5].running_mean, torch.zeros(16))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_network_resumes_to_the_bit(ranks: Warm, tmp_path: Path, cache: Path, world: int) -> None:
    some = Runs(ranks, tmp_path, cache, "sgd", True, {"compile": True})
    straight = some.go(world, [("straight", None), ("at-2", 2), ("at-3", 3)], timeout=240)["straight"]
    assert some.go(world, [("at-2", None), ("at-3", None)], timeout=240) == {"at-2": straight, "at-3": straight}


def test_the_digests_tell_two_runs_apart(ranks: Warm, tmp_path: Path, cache: Path) -> None:
    sgd = Runs(ranks, tmp_path / "sgd", cache, "sgd", False).go(1, [("run", None)])["run"]
    adam = Runs(ranks, tmp_path / "adam", cache, "adam", False).go(1, [("run", None)])["run"]
    assert all(sgd[part] != adam[part] for part in ("network", "optimizer", "ema", "rows"))


@pytest.mark.dist
def test_another_number_of_processes_goes_on_with_the_same_samples(ranks: Warm, tmp_path: Path, cache: Path) -> None:
    from dtrain.run.rows import comparable
    from dtrain.run.rundir import read_rows

    some = Runs(ranks, tmp_path, cache, "sgd", False)
    some.go(2, [("straight", None), ("moved", 3)])
    some.go(1, [("moved", None)])
    straight, moved = (comparable(read_rows(tmp_path / name)) for name in ("straight", "moved"))
    exact = ("kind", "step", "epoch", "samples", "lr", "images_in_interval", "images")
    assert [[r.get(f) for f in exact] for r in straight] == [[r.get(f) for f in exact] for r in moved]
    before = [row for row in straight if row["step"] <= 3]
    assert before == [row for row in moved if row["step"] <= 3]  # up to the stop the rows are the same in every figure
    assert len(before) == 3
    assert moved[-1]["loss"] == pytest.approx(straight[-1]["loss"], abs=0.2)  # after it, other dropout and rounding
