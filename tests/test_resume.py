"""The claim the project stands on: stopped after any step and resumed, a run ends with the bits of the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from warm import Warm

STEPS = 5


def run(output: Path, cache: Path, optimizer: str, fused: bool, stop_after: int | None) -> dict[str, Any]:
    """One rank of a short run on a network with batch norm and dropout, accumulation, EMA, channels-last."""
    from dtrain.commands.prove import digests
    from dtrain.config import TrainConfig
    from dtrain.errors import Stopped
    from dtrain.training import train
    from dtrain.world import place

    config = TrainConfig.of(
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
        output=output,
    )
    try:
        train(config, stop_after=stop_after)
    except Stopped:
        return {"stopped": stop_after}
    return digests(output) if place().is_main else {}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        ("sgd", True),
        ("sgd", False),
        ("adam", True),
        ("adam", False),
        ("adamw", True),
        ("adamw", False),
        ("muon", False),
    ],
)
def test_stopped_after_any_step_and_resumed_ends_with_the_same_bits(
    ranks: Warm, tmp_path: Path, cache: Path, optimizer: str, fused: bool, world: int
) -> None:
    def go(name: str, stop_after: int | None = None) -> dict[str, Any]:
        kwargs = {"output": tmp_path / name, "cache": cache, "optimizer": optimizer, "fused": fused}
        results: list[dict[str, Any]] = ranks.call("test_resume:run", world, {**kwargs, "stop_after": stop_after})
        return results[0]

    straight = go("straight")
    assert straight["step"] == str(STEPS)
    # every step for one process; the first, a middle and the last for more, which the slow suite completes
    for k in range(1, STEPS) if world == 1 else (1, 3):
        assert go(f"at-{k}", stop_after=k) == {"stopped": k}
        assert go(f"at-{k}") == straight


@pytest.mark.dist
def test_another_number_of_processes_goes_on_with_the_same_samples(ranks: Warm, tmp_path: Path, cache: Path) -> None:
    from dtrain.run.rundir import comparable, read_rows

    def go(name: str, world: int, stop_after: int | None = None) -> None:
        kwargs = {"output": tmp_path / name, "cache": cache, "optimizer": "sgd", "fused": False}
        ranks.call("test_resume:run", world, {**kwargs, "stop_after": stop_after})

    go("straight", 2)
    go("moved", 2, stop_after=3)
    go("moved", 1)
    straight, moved = (comparable(read_rows(tmp_path / name)) for name in ("straight", "moved"))
    exact = ("kind", "step", "epoch", "samples", "lr", "images_in_interval", "images")
    assert [[r.get(f) for f in exact] for r in straight] == [[r.get(f) for f in exact] for r in moved]
    assert straight[:3] == moved[:3]  # up to the stop the rows are the same in every figure
    assert moved[-1]["loss"] == pytest.approx(straight[-1]["loss"], abs=0.2)  # after it, other dropout and rounding
