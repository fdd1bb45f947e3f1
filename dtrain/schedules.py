"""Learning-rate schedules: pure functions of samples seen.

Each is `f(seen, total, **options) -> factor`, with 0 <= seen < total in samples and the factor multiplying every
group's own rate. Nothing is stepped and nothing is saved, so a resume cannot be off by one. Warm-up is the same for
all and is applied around them by `factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.errors import UsageError

Schedule = Callable[..., float]


def constant(seen: float, total: float) -> float:
    """1 throughout."""
    return 1.0


def linear(seen: float, total: float, *, final: float = 0.0) -> float:
    """A straight line from 1 to `final` (>= 0) at the end."""
    return 1.0 + (final - 1.0) * seen / total


def cosine(seen: float, total: float, *, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final` (Loshchilov and Hutter 2017, without restarts)."""
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * seen / total))


def onecycle(seen: float, total: float, *, peak: float = 0.3, start: float = 0.04, final: float = 1e-4) -> float:
    """Up from `start` to 1 at fraction `peak` of the run, then down to `final`, both by half a cosine.

    peak in (0, 1); start, final >= 0. The shape of Smith and Topin 2018 as torch's OneCycleLR draws it.
    """
    top = peak * total
    if seen < top:
        return 1.0 + (start - 1.0) * 0.5 * (1.0 + math.cos(math.pi * seen / top))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * (seen - top) / (total - top)))


def step(seen: float, total: float, *, every: float = 1 / 3, gamma: float = 0.1) -> float:
    """Times `gamma` after each fraction `every` in (0, 1] of the run."""
    return gamma ** math.floor(seen / (every * total) + 1e-9)


def multistep(seen: float, total: float, *, milestones: tuple[float, ...] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Times `gamma` at each of `milestones`, fractions of the run in (0, 1)."""
    return gamma ** sum(seen >= at * total for at in milestones)


def trapezoid(seen: float, total: float, *, decay: float = 0.4, final: float = 0.0) -> float:
    """1, then a straight line to `final` over the last fraction `decay` in (0, 1] of the run."""
    start = (1.0 - decay) * total
    return 1.0 if seen < start else 1.0 + (final - 1.0) * (seen - start) / (total - start)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "onecycle": onecycle,
    "step": step,
    "multistep": multistep,
    "trapezoid": trapezoid,
}


# lowest, highest, whether the lowest itself is allowed, whether the highest is; of each number of an option
RANGES = {
    "final": (0.0, math.inf, True, False),
    "start": (0.0, math.inf, True, False),
    "gamma": (0.0, math.inf, True, False),
    "peak": (0.0, 1.0, False, False),
    "every": (0.0, 1.0, False, True),
    "decay": (0.0, 1.0, False, True),
    "milestones": (0.0, 1.0, False, False),
}


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError for an option of schedule `name` outside its range: it would make a rate that is none."""
    for option, value in options.items():
        low, high, low_in, high_in = RANGES[option]
        for number in value if isinstance(value, tuple) else (value,):
            if not (low < number < high or (number == low and low_in) or (number == high and high_in)):
                interval = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
                raise UsageError(f"schedule {name}: {option}={number:g}: give a number in {interval}")


def factor(name: str, seen: int, total: int, *, warmup: int, batch: int, options: dict[str, Any]) -> float:
    """The factor for a step of `batch` samples that begins with `seen` of `total` samples done.

    While `seen` < `warmup` (0 <= warmup < total) it rises linearly towards where the schedule starts, and the first
    step already moves; the schedule itself is stretched over what remains after the warm-up.
    """
    if seen < warmup:
        return (seen + batch) / (warmup + batch) * SCHEDULES[name](0, total - warmup, **options)
    return SCHEDULES[name](seen - warmup, total - warmup, **options)
