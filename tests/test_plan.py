"""Claims about the plan: every derived number, worked out by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from dtrain.config import TrainConfig
from dtrain.errors import UsageError
from dtrain.plan import Plan, make_plan

DIGITS, CIFAR = 1_437, 50_000


def plan(train_size: int = DIGITS, world_size: int = 1, **flags: Any) -> Plan:
    config = TrainConfig.of(arch="allcnn_c", recipe="none", **flags)
    return make_plan(config, train_size=train_size, world_size=world_size)


def due(at: Any, last: int) -> list[int]:
    return [step for step in range(1, last + 1) if at(step)]


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_run_by_hand() -> None:
    made = plan(CIFAR, 2, batch_size=1000, epochs=16, grad_accum_steps=2, warmup_epochs=2)
    assert (made.share, made.micro_batch) == (500, 250)
    assert (made.steps_per_epoch, made.total_steps, made.total_samples) == (50, 800, 800_000)
    assert made.warmup_samples == 100_000
    assert made.lines(0.05) == [
        "batch 1000 = 2 processes x 500, each in 2 micro-batches of 250",
        "50 steps an epoch = 50000 // 1000",
        "800 steps in all = 16 epochs",
        "peak rate 0.05, linear after a warm-up of 100000 images",
    ]


def test_the_tail_of_an_epoch_is_left_out_and_said() -> None:
    made = plan(batch_size=64)
    assert made.steps_per_epoch == 22  # 22 x 64 = 1408
    assert made.lines(0.1)[1] == "22 steps an epoch = 1437 // 64; 29 images of each epoch's order are left out"


@pytest.mark.parametrize(("epochs", "steps"), [(2.5, 55), (0.1, 2), (0.001, 1), (1, 22)])
def test_epochs_may_be_fractions_and_are_at_least_one_step(epochs: float, steps: int) -> None:
    assert plan(batch_size=64, epochs=epochs).total_steps == steps


def test_steps_take_the_place_of_epochs() -> None:
    made = plan(batch_size=64, steps=33)
    assert made.total_steps == 33
    assert [made.epoch_at(step) for step in (0, 21, 22, 32)] == [0, 0, 1, 1]


def test_the_rate_follows_the_schedule_over_warm_up_and_run() -> None:
    made = plan(1000, batch_size=100, epochs=2, warmup_epochs=0.5, schedule="linear", schedule_opt=["final=0.5"])
    # five steps of warm-up at 1/6 .. 5/6, then fifteen from 1 towards a half
    assert made.lr_factor(0) == pytest.approx(1 / 6)
    assert made.lr_factor(400) == pytest.approx(5 / 6)
    assert made.lr_factor(500) == 1.0
    assert made.lr_factor(1900) == pytest.approx(1 - 0.5 * 14 / 15)


def test_what_is_due_when() -> None:
    made = plan(1000, batch_size=100, epochs=2.5, eval_every="1epoch", checkpoint_every="7steps", log_interval=6)
    assert made.total_steps == 25
    assert due(made.evaluates_at, 25) == [10, 20, 25]
    assert due(made.saves_at, 25) == [7, 14, 21, 25]
    assert due(made.logs_at, 25) == [6, 12, 18, 24, 25]
    fractions = plan(1000, batch_size=100, epochs=1, eval_every="0.25epochs", checkpoint_every="10min")
    assert due(fractions.evaluates_at, 10) == [3, 5, 8, 10]  # the first step at or past 2.5, 5, 7.5 and 10
    assert due(fractions.saves_at, 10) == [10]
    assert due(plan(1000, batch_size=100, epochs=1, eval_every="end").evaluates_at, 10) == [10]


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 4, 5, 13])
def test_the_shares_of_any_world_put_together_are_the_global_batch(step: int) -> None:
    alone = plan(103, 1, batch_size=20, epochs=3)
    for world_size in (1, 2, 4):
        made = plan(103, world_size, batch_size=20, epochs=3)
        shares = [made.share_of(step, rank) for rank in range(world_size)]
        assert [len(share) for share in shares] == [20 // world_size] * world_size
        assert np.array_equal(np.concatenate(shares), alone.batch(step))


def test_an_epoch_takes_each_image_at_most_once_and_the_next_in_another_order() -> None:
    made = plan(103, batch_size=20, epochs=2)
    epochs = [np.concatenate([made.batch(5 * epoch + k) for k in range(5)]) for epoch in (0, 1)]
    for positions in epochs:
        assert len(set(positions.tolist())) == 100
        assert positions.min() >= 0
        assert positions.max() < 103
    assert not np.array_equal(*epochs)
    assert np.array_equal(made.batch(7), plan(103, 4, batch_size=20, steps=99).batch(7))
    assert not np.array_equal(made.batch(7), plan(103, batch_size=20, epochs=2, seed=1).batch(7))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "flags", "told"),
    [
        (3, {"batch_size": 1000}, "--batch-size 1000 does not divide over 3 processes; try 999 or 1002"),
        (
            2,
            {"batch_size": 100, "grad_accum_steps": 8},
            "--batch-size 100 does not divide over 2 processes x 8 micro-batches; try 96 or 112",
        ),
        (4, {"batch_size": 2}, "--batch-size 2 does not divide over 4 processes; try 4"),
        (
            2,
            {"batch_size": 50, "mixup": 0.2},
            "--batch-size 50 does not divide over 2 processes into the pairs of --mixup; try 48 or 52",
        ),
        (
            1,
            {"batch_size": 33, "mixup": 0.2, "cutmix": 1},
            "--batch-size 33 does not divide over 1 process into the pairs of --mixup and --cutmix; try 32 or 34",
        ),
        (
            2,
            {"batch_size": 50, "cutmix": 1, "grad_accum_steps": 3},
            "over 2 processes x 3 micro-batches into the pairs of --cutmix; try 48 or 60",
        ),
        (
            2,
            {"batch_size": 2000},
            "--batch-size 2000 is larger than the training set of 1437 images; give at most 1436",
        ),
        (1500, {"batch_size": 1500}, "larger than the training set of 1437 images; use fewer processes"),
        (
            1,
            {"batch_size": 64, "epochs": 2, "warmup_epochs": 3},
            "--warmup-epochs 3 is 66 of 44 steps and leaves none for the schedule; give less than 2",
        ),
        (1, {"schedule_opt": ["finall=0.1"]}, "schedule linear has no option 'finall'; did you mean 'final'?"),
        (1, {"schedule_opt": ["total=3"]}, "schedule linear has no option 'total'"),
        (1, {"schedule": "step", "schedule_opt": ["every=0"]}, "schedule step: every=0: give a number in (0, 1]"),
    ],
)
def test_what_cannot_be_planned_is_told_with_what_can(world_size: int, flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        plan(world_size=world_size, **flags)


def test_where_images_are_mixed_shares_are_even_and_micro_batches_need_not_be() -> None:
    made = plan(world_size=2, batch_size=12, grad_accum_steps=2, mixup=0.2)
    assert (made.share, made.micro_batch) == (6, 3)


def test_a_recipes_warm_up_gives_way_to_a_short_trial() -> None:
    config = TrainConfig.of(arch="allcnn_c", dataset="digits", steps=6)  # its recipe warms up for a whole epoch
    assert config.origin("warmup_epochs").startswith("recipe")
    assert make_plan(config, train_size=DIGITS, world_size=1).warmup_samples == 3 * config.batch_size


def test_a_warm_up_that_fits_means_the_same_from_a_flag_and_from_a_run_that_is_resumed(tmp_path: Path) -> None:
    given = TrainConfig.of(arch="allcnn_c", dataset="digits", epochs=10, warmup_epochs=6)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(given.settings()))
    resumed = TrainConfig.of(resume=str(tmp_path))
    stored = TrainConfig.stored(given.settings())
    plans = [make_plan(config, train_size=DIGITS, world_size=1) for config in (given, resumed, stored)]
    assert [made.warmup_samples for made in plans] == [6 * plans[0].steps_per_epoch * given.batch_size] * 3
