"""Claims about learning-rate schedules: values worked out by hand at the points that matter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dtrain import plugins
from dtrain.errors import PluginError, UsageError
from dtrain.schedules import chosen_schedule, factor

TOTAL = 120  # samples
ZOO = ["constant", "cosine", "linear", "multistep", "onecycle", "step", "trapezoid"]


def schedule(name: str) -> Callable[..., float]:
    return plugins.load(plugins.find("schedule", name))


def test_these_come_with_dtrain() -> None:
    assert [plugin.name for plugin in plugins.listed("schedule") if plugin.distribution == "dtrain"] == ZOO


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("constant", {}, {0: 1, 60: 1, 119: 1}),
        ("linear", {}, {0: 1, 30: 0.75, 60: 0.5, 90: 0.25}),
        ("linear", {"final": 0.2}, {0: 1, 60: 0.6, 90: 0.4}),
        # (1 + cos x) / 2 at x = 0, 60, 90, 120 degrees
        ("cosine", {}, {0: 1, 40: 0.75, 60: 0.5, 80: 0.25}),
        ("cosine", {"final": 0.2}, {0: 1, 60: 0.6, 80: 0.4}),
        # up over 30 samples, from 0.1, halfway at 15; down over 90 to 0, at 60 and 120 degrees
        (
            "onecycle",
            {"peak": 0.25, "start": 0.1, "final": 0.0},
            {0: 0.1, 15: 0.55, 30: 1, 60: 0.75, 75: 0.5, 90: 0.25},
        ),
        ("step", {}, {0: 1, 39: 1, 40: 0.1, 79: 0.1, 80: 0.01, 119: 0.01}),
        ("step", {"every": 0.5, "gamma": 0.5}, {59: 1, 60: 0.5, 119: 0.5}),
        ("multistep", {}, {0: 1, 59: 1, 60: 0.1, 89: 0.1, 90: 0.01}),
        ("multistep", {"milestones": (0.1, 0.2, 0.9), "gamma": 0.5}, {11: 1, 12: 0.5, 24: 0.25, 108: 0.125}),
        ("trapezoid", {}, {0: 1, 72: 1, 84: 0.75, 96: 0.5, 108: 0.25}),
        ("trapezoid", {"decay": 1.0, "final": 0.5}, {0: 1, 60: 0.75, 90: 0.625}),
    ],
)
def test_schedules_have_the_values_worked_out_by_hand(
    name: str, options: dict[str, Any], values: dict[int, float]
) -> None:
    for seen, value in values.items():
        bound = partial(schedule(name), **options)
        assert bound(seen, TOTAL) == pytest.approx(value, abs=1e-12), seen
        assert factor(bound, seen, TOTAL, warmup=0, batch=1) == bound(seen, TOTAL)


@pytest.fixture(scope="module")
def torch() -> Any:
    import torch

    torch.optim.SGD([torch.zeros(1)], 0.1)  # the first in a process makes torch set an environment variable
    return torch


def test_onecycle_is_drawn_as_torch_draws_it(torch: Any) -> None:
    # torch steps through indices 0 .. n - 1 and ends in the last: over 11 steps it spans 10, 3 up and 7 down
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=11, pct_start=4 / 11, div_factor=25, final_div_factor=400, cycle_momentum=False
    )
    for k in range(11):
        assert schedule("onecycle")(k, 10) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        if k < 10:
            theirs.step()


def test_warm_up_rises_in_a_straight_line_and_the_schedule_takes_the_rest() -> None:
    def at(seen: int, name: str = "linear", **options: Any) -> float:
        return factor(partial(schedule(name), **options), seen, TOTAL, warmup=40, batch=10)

    # batches of 10: the four steps of the warm-up move by 1/5 .. 4/5, the fifth is the schedule's first
    assert [at(seen) for seen in (0, 10, 20, 30)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [at(seen) for seen in (40, 60, 80, 100)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    # towards where the schedule begins, which for one-cycle is not its peak
    assert at(0, "onecycle", start=0.5) == pytest.approx(0.1)
    assert at(40, "onecycle", start=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("warmup", [0, 30])
def test_the_factor_is_pure_finite_and_between_0_and_1(name: str, warmup: int) -> None:
    at = partial(factor, schedule(name), warmup=warmup, batch=3)
    forward = [at(seen, TOTAL) for seen in range(0, TOTAL, 3)]
    backward = [at(seen, TOTAL) for seen in reversed(range(0, TOTAL, 3))]
    assert forward == backward[::-1]
    assert all(math.isfinite(value) and 0 < value <= 1 for value in forward)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("step", "every=0", "schedule step: every=0: give a number in (0, 1]"),
        ("onecycle", "peak=1", "schedule onecycle: peak=1: give a number in (0, 1)"),
        ("trapezoid", "decay=1.5", "schedule trapezoid: decay=1.5: give a number in (0, 1]"),
        ("multistep", "milestones=0.5,50", "schedule multistep: milestones=50: give a number in (0, 1)"),
        ("cosine", "final=-0.1", "schedule cosine: final=-0.1: give a number in [0, inf)"),
        ("linear", "final=nan", "schedule linear: final=nan: give a number in [0, inf)"),
        ("linear", "finall=0", "schedule linear has no option 'finall'; did you mean 'final'?"),
        ("linear", "total=3", "schedule linear has no option 'total'"),
        ("linear", "final=low", "schedule linear: final=low: give a number"),
        ("linaer", "final=0", "schedule 'linaer' is not installed; did you mean 'linear'?"),
    ],
)
def test_a_wrong_name_or_option_is_told(name: str, options: str, told: str) -> None:
    key, _, value = options.partition("=")
    with pytest.raises(UsageError, match=re.escape(told)):
        chosen_schedule(name, {key: value}, total=TOTAL)


@pytest.mark.parametrize("name", ZOO)
def test_every_option_of_the_zoo_refuses_what_would_make_no_rate(name: str) -> None:
    for option in plugins.options_of(schedule(name)):
        with pytest.raises(UsageError, match=re.escape(f"schedule {name}: {option}=-1: give a number")):
            chosen_schedule(name, {option: "-1"}, total=TOTAL)


STRANGERS = """
import numpy as np

def half(seen, total, *, floor: float):
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor}: give a fraction")
    return np.float32(0.5) if seen < total / 2 else floor

def negative(seen, total):
    return -1.0

def text(seen, total):
    return "1"

def broken(seen, total):
    return {}["rate"]

def later(seen, total):
    return float("nan") if seen else 1.0
"""


def test_a_function_of_a_file_is_a_schedule_and_what_is_wrong_with_it_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(STRANGERS)
    half = chosen_schedule(f"{file}:half", {"floor": "0.25"}, total=TOTAL)
    assert [factor(half, seen, TOTAL, warmup=0, batch=1) for seen in (0, 59, 60)] == [0.5, 0.5, 0.25]
    for name, options, told in (
        ("half", {"floor": "2"}, "half: floor=2.0: give a fraction"),
        ("half", {}, "missing 1 required keyword-only argument: 'floor'"),
        ("negative", {}, "negative of mine.py local .* gives -1.0 at the start of the run; a factor of the learning"),
        ("text", {}, "gives '1' at the start of the run"),
        ("broken", {}, "fails at the start of the run: KeyError: 'rate'"),
    ):
        with pytest.raises(UsageError, match=told):
            chosen_schedule(f"{file}:{name}", options, total=TOTAL)
    later = chosen_schedule(f"{file}:later", {}, total=TOTAL)
    with pytest.raises(PluginError, match="the schedule gives nan after 10 of 120 samples"):
        factor(later, 10, TOTAL, warmup=0, batch=1)
