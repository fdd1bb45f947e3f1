"""Claims about the plan: every derived number, worked out by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from dtrain.assembly import plan_of
from dtrain.errors import UsageError
from dtrain.plan import Plan, cuts, shares_of
from dtrain.plugins import recipes
from dtrain.settings import identity
from dtrain.settings.config import TrainConfig
from dtrain.settings.staged import Staged

DIGITS, CIFAR = 1_437, 50_000


def plan(train_size: int = DIGITS, world_size: int = 1, **flags: Any) -> Plan:
    config = TrainConfig.of(arch="allcnn_c", recipe="none", **flags)
    return plan_of(config, train_size=train_size, image_size=32, world_size=world_size)


def due(at: Any, last: int) -> list[int]:
    return [step for step in range(1, last + 1) if at(step)]


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_run_by_hand() -> None:
    made = plan(CIFAR, 2, batch_size=1000, epochs=16, grad_accum_steps=2, warmup_epochs=2)
    assert made.at(0).shares == shares_of(1000, world_size=2, grad_accum_steps=2, unit=1)
    assert [(share.first, share.micro_batches) for share in made.at(0).shares] == [(0, (250, 250)), (500, (250, 250))]
    assert (made.total_steps, made.total_samples) == (800, 800_000)
    assert (made.largest_share, made.largest_micro_batch, made.shapes) == (500, 250, ((250, 32),))
    assert made.warmup_samples == 100_000
    assert made.lines(0.05) == [
        "batch 1000 = 2 processes x 500, each in 2 micro-batches of 250",
        "50 steps an epoch = 50000 // 1000",
        "800 steps in all = 16 epochs",
        "peak rate 0.05, linear after a warm-up of 100000 images",
    ]


def test_the_tail_of_an_epoch_is_left_out_and_said() -> None:
    made = plan(batch_size=64)
    assert [made.at(step).first for step in (0, 1, 21, 22)] == [0, 64, 1344, 0]  # 22 x 64 = 1408
    assert made.lines(0.1)[1] == "22 steps an epoch = 1437 // 64; 29 images of each epoch's order are left out"


@pytest.mark.parametrize(("epochs", "steps"), [(2.5, 55), (0.1, 2), (0.001, 1), (1, 22)])
def test_epochs_may_be_fractions_and_are_at_least_one_step(epochs: float, steps: int) -> None:
    assert plan(batch_size=64, epochs=epochs).total_steps == steps


def test_steps_take_the_place_of_epochs() -> None:
    made = plan(batch_size=64, steps=33)
    assert made.total_steps == 33
    assert [made.at(step).epoch for step in (0, 21, 22, 32)] == [0, 0, 1, 1]


def test_the_rate_follows_the_schedule_over_warm_up_and_run() -> None:
    made = plan(1000, batch_size=100, epochs=2, warmup_epochs=0.5, schedule="linear", schedule_opt=["final=0.5"])
    # five steps of warm-up at 1/6 .. 5/6, then fifteen from 1 towards a half
    assert made.at(0).lr_factor == pytest.approx(1 / 6)
    assert made.at(4).lr_factor == pytest.approx(5 / 6)
    assert made.at(5).lr_factor == 1.0
    assert made.at(19).lr_factor == pytest.approx(1 - 0.5 * 14 / 15)


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
    for world_size in (1, 2, 3, 4, 7, 20):
        made = plan(103, world_size, batch_size=20, epochs=3)
        shares = [made.batch(step)[share.positions] for share in made.at(step).shares]
        assert len(shares) == world_size
        assert {len(share) for share in shares} <= {20 // world_size, -(-20 // world_size)}
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
        (
            2,
            {"batch_size": 11, "grad_accum_steps": 6},
            "--grad-accum-steps 6: of --batch-size 11 over 2 processes, one gets only 5 images, too few for so many "
            "micro-batches; give at most 5, or a larger batch",
        ),
        (
            4,
            {"batch_size": 3},
            "--batch-size 3 is too small for 4 processes, each of which needs an image; give at least 4, or start at "
            "most 3",
        ),
        (
            4,
            {"batch_size": 6, "mixup": 0.2},
            "--batch-size 6 is too small for 4 processes, each of which needs a pair of images for --mixup; give at "
            "least 8, or start at most 3",
        ),
        (
            2,
            {"batch_size": 33, "mixup": 0.2, "cutmix": 1},
            "--batch-size 33 does not divide into the pairs of --mixup and --cutmix; try 32 or 34",
        ),
        (1, {"batch_size": 1, "cutmix": 1}, "--batch-size 1 does not divide into the pairs of --cutmix; try 2"),
        (
            2,
            {"batch_size": "64,33@3", "cutmix": 1},
            "--batch-size 33 does not divide into the pairs of --cutmix; try 32 or 34",
        ),
        (
            2,
            {"batch_size": 2000},
            "--batch-size 2000 is larger than the training set of 1437 images; give at most 1437",
        ),
        (
            2,
            {"batch_size": "64,2000@2", "mixup": 1},
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
    assert [share.micro_batches for share in made.at(0).shares] == [(3, 3), (3, 3)]
    uneven = plan(world_size=3, batch_size=64, mixup=0.2)  # 32 pairs
    assert [(share.first, share.size) for share in uneven.at(0).shares] == [(0, 20), (20, 22), (42, 22)]


def test_cuts_lie_where_they_were_computed_by_hand() -> None:
    assert cuts(64, 3) == (0, 21, 42, 64)
    assert cuts(64, 5) == (0, 12, 25, 38, 51, 64)
    assert cuts(7, 3) == (0, 2, 4, 7)
    assert cuts(250, 4) == (0, 62, 125, 187, 250)
    assert cuts(10, 4, 2) == (0, 2, 4, 6, 10)  # 5 pairs: 1, 1, 1 and 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("recipe", [recipe.name for recipe in recipes()])
def test_every_recipe_starts_as_it_is(recipe: str, world_size: int) -> None:
    sizes = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_437, "mnist": 60_000, "hymenoptera-400": 244}
    arch, _, dataset = recipe.partition("-")
    config = TrainConfig.of(arch=arch, recipe=recipe)
    made = plan_of(config, train_size=sizes[dataset or "cifar10"], image_size=32, world_size=world_size)
    shares = made.at(0).shares
    assert len(shares) == world_size
    assert [share.first for share in shares] == [sum(s.size for s in shares[:rank]) for rank in range(world_size)]
    assert sum(share.size for share in shares) == config.optimization.batch_size.at(0)
    assert max(share.size for share in shares) - min(share.size for share in shares) <= 1


def test_a_recipes_warm_up_gives_way_to_a_short_trial() -> None:
    config = TrainConfig.of(arch="allcnn_c", dataset="digits", steps=6)  # its recipe warms up for a whole epoch
    assert config.origin("warmup_epochs").startswith("recipe")
    made = plan_of(config, train_size=DIGITS, image_size=32, world_size=1)
    assert made.warmup_samples == 3 * 64


def test_a_warm_up_that_fits_means_the_same_from_a_flag_and_from_a_run_that_is_resumed(tmp_path: Path) -> None:
    given = TrainConfig.of(arch="allcnn_c", dataset="digits", epochs=10, warmup_epochs=6)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(given.settings()))
    resumed = TrainConfig.of(resume=str(tmp_path))
    stored = TrainConfig.stored(given.settings())
    plans = [plan_of(config, train_size=DIGITS, image_size=32, world_size=1) for config in (given, resumed, stored)]
    assert [made.warmup_samples for made in plans] == [6 * 22 * 64] * 3


# -- stages ------------------------------------------------------------------------------------------------------------


def test_batch_64_for_200_epochs_then_640_comes_out_to_the_step() -> None:
    """The published way to anneal by batch size, on 45,000 training images of CIFAR-10, warmed up for 5 epochs.

    By hand: 45,000 // 64 = 703 steps an epoch, 140,600 until epoch 200, 703 x 64 = 44,992 images an epoch, so 8,998,400
    images; then 45,000 // 640 = 70 steps an epoch of 44,800 images. 100 epochs of them: 7,000 steps, 4,480,000 images.
    """
    made = plan(45_000, batch_size="64,640@200", epochs=300, warmup_epochs=5, eval_every="50epochs")
    assert (made.total_steps, made.total_samples) == (147_600, 13_478_400)
    assert made.warmup_samples == 224_960  # 5 x 44,992
    last, first, second = (made.at(step) for step in (140_599, 140_600, 140_601))
    assert (last.epoch, last.batch_size, last.first, last.samples) == (199, 64, 44_928, 8_998_336)
    assert (first.epoch, first.batch_size, first.first, first.samples) == (200, 640, 0, 8_998_400)
    assert (second.epoch, second.batch_size, second.first, second.samples) == (200, 640, 640, 8_999_040)
    # a straight line from 1 at the end of the warm-up to 0 at the end, over 13,478,400 - 224,960 = 13,253,440 images
    assert last.lr_factor == pytest.approx(1 - 8_773_376 / 13_253_440)
    assert first.lr_factor == pytest.approx(1 - 8_773_440 / 13_253_440)
    assert second.lr_factor == pytest.approx(1 - 8_774_080 / 13_253_440)
    assert made.at(147_599).lr_factor == pytest.approx(640 / 13_253_440)
    # six evaluations: 50 x 703 = 35,150 steps apart, then 50 x 70 = 3,500
    due = [35_150, 70_300, 105_450, 140_600, 144_100, 147_600]
    assert all(made.evaluates_at(step) for step in due)
    assert not any(made.evaluates_at(step + off) for step in due[:-1] for off in (-1, 1))
    assert [made.epochs_done(step) for step in due] == [50, 100, 150, 200, 250, 300]


def test_the_order_within_an_epoch_is_cut_by_the_batch_of_its_stage() -> None:
    from dtrain.keyed import order

    made = plan(103, batch_size="20,50@1,30@2", epochs=3)  # 5, 2 and 3 steps an epoch
    assert made.total_steps == 10
    walked = [order(103, 0, 0)[at : at + 20] for at in range(0, 100, 20)]
    walked += [order(103, 0, 1)[at : at + 50] for at in (0, 50)]
    walked += [order(103, 0, 2)[at : at + 30] for at in (0, 30, 60)]
    for step, positions in enumerate(walked):
        assert np.array_equal(made.batch(step), positions)
    assert [made.at(step).samples for step in range(10)] == [0, 20, 40, 60, 80, 100, 150, 200, 230, 260]
    assert made.total_samples == 290


def test_image_sizes_change_at_their_epochs_and_begin_stages_of_their_own() -> None:
    made = plan(103, batch_size="20,50@1", image_size="16,24@1,32@2", epochs=3, grad_accum_steps=3)
    assert [made.at(step).image_size for step in range(9)] == [16] * 5 + [24] * 2 + [32] * 2
    assert made.image_sizes == (16, 24, 32)
    assert made.shapes == ((6, 16), (7, 16), (16, 24), (16, 32), (17, 24), (17, 32))


def test_steps_walk_through_the_stages_and_a_change_after_the_end_is_told() -> None:
    made = plan(103, batch_size="20,50@1,30@7", steps=6)
    assert [made.at(step).batch_size for step in range(6)] == [20] * 5 + [50]
    assert made.epochs_done(6) == 1.5
    assert made.lines(0.1) == [
        "from the start: images of 32 x 32 pixels",
        "batch 20 = 1 process",
        "5 steps an epoch = 103 // 20; 3 images of each epoch's order are left out",
        "from epoch 1, after 5 steps: images of 32 x 32 pixels",
        "batch 50 = 1 process",
        "2 steps an epoch = 103 // 50; 3 images of each epoch's order are left out",
        "epoch 7, with batch 30 and images of 32 x 32 pixels, comes after the end of this run",
        "6 steps in all = 1.5 epochs",
        "peak rate 0.1, linear",
    ]
    for short in ({"epochs": 1}, {"epochs": 1.1}, {"steps": 5}):  # a tenth of two steps is none
        assert plan(103, batch_size="20,50@1", **short).lines(0.1)[:3] == [
            "batch 20 = 1 process",
            "5 steps an epoch = 103 // 20; 3 images of each epoch's order are left out",
            "epoch 1, with batch 50 and images of 32 x 32 pixels, comes after the end of this run",
        ]
    assert plan(103, batch_size="20,500@9", epochs=1).total_steps == 5  # what is not reached need not fit the data


def test_a_warm_up_goes_on_through_a_change_of_the_batch() -> None:
    made = plan(100, batch_size="10,20@1", epochs=4, warmup_epochs=2)  # 10 steps of 10, then 5 an epoch of 20
    assert made.warmup_samples == 200
    # (seen + batch) / (warm-up + batch), as without stages
    assert made.at(9).lr_factor == pytest.approx(100 / 210)
    assert made.at(10).lr_factor == pytest.approx(120 / 220)
    assert made.at(15).lr_factor == 1.0


def test_shares_that_differ_are_told_with_both_sizes() -> None:
    assert plan(world_size=4, batch_size=250).lines(0.1)[0] == "batch 250 = 4 processes x 62 or 63"
    cut = plan(world_size=4, batch_size=250, grad_accum_steps=2).lines(0.1)[0]
    assert cut == "batch 250 = 4 processes x 62 or 63, each in 2 micro-batches of 31 or 32"


@pytest.mark.parametrize(
    ("batch", "accumulation", "world", "told"),
    [
        (128, 1, 1, "try --batch-size 64, or --grad-accum-steps 2, which keeps the batch"),
        (90, 3, 2, "try --batch-size 45, or --grad-accum-steps 6, which keeps the batch"),
        (6, 3, 2, "one image at a time is too much: use a smaller network"),  # half of it is 1 or 2 a process
        (7, 2, 2, "try --grad-accum-steps 3, which keeps the batch"),  # 3 and 4 images; half of it is 1 or 2
        ("64,640@2", 1, 2, "try --batch-size 32,320@2, or --grad-accum-steps 2, which keeps the batch"),
    ],
)
def test_where_memory_is_short_half_as_many_images_at_a_time_are_advised(
    batch: Any, accumulation: int, world: int, told: str
) -> None:
    made = plan(1000, world, batch_size=batch, grad_accum_steps=accumulation)
    assert made.lighter() == told


@pytest.mark.parametrize("value", [64, "64", " 64 ", 64.0, Staged.parse(64), "64,64@3"])
def test_a_size_that_never_changes_is_one_value_however_it_is_given(value: Any) -> None:
    assert plan(batch_size=value) == plan(batch_size=64)
    given, plain = (TrainConfig.of(recipe="none", arch="x", batch_size=size) for size in (value, 64))
    assert identity.digest(given) == identity.digest(plain)
