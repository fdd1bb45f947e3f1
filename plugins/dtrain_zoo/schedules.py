"""Learning-rate schedules as plugins: pure functions of the samples seen so far.

Each is `f(seen, total, **options) -> factor`, where `seen` of the `total` samples of the run are done, 0 <= seen <
total, and the factor multiplies the learning rate of every parameter group. The trainer itself adds the warm-up before
the schedule, so there is none here. Each raises ValueError for an option that is out of bounds.
"""

from __future__ import annotations

import math


def constant(seen: float, total: float) -> float:
    """1 throughout."""
    return 1.0


def linear(seen: float, total: float, *, final: float = 0.0) -> float:
    """A straight line from 1 to `final` (>= 0) at the end."""
    _not_negative(final=final)
    return 1.0 + (final - 1.0) * seen / total


def cosine(seen: float, total: float, *, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final` (>= 0) at the end (Loshchilov and Hutter 2017, without restarts)."""
    _not_negative(final=final)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * seen / total))


def onecycle(seen: float, total: float, *, peak: float = 0.3, start: float = 0.04, final: float = 1e-4) -> float:
    """Up from `start` to 1 at the fraction `peak` of the run, then down to `final`, both by half a cosine.

    `peak` lies in (0, 1); `start` and `final` are not negative. This is the shape of Smith and Topin 2018 as torch's
    OneCycleLR draws it.
    """
    _between_0_and_1(peak=peak)
    _not_negative(start=start, final=final)
    top = peak * total
    if seen < top:
        return 1.0 + (start - 1.0) * 0.5 * (1.0 + math.cos(math.pi * seen / top))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * (seen - top) / (total - top)))


def step(seen: float, total: float, *, every: float = 1 / 3, gamma: float = 0.1) -> float:
    """Multiplied by `gamma` (>= 0) after each fraction `every`, in (0, 1], of the run."""
    _fraction(every=every)
    _not_negative(gamma=gamma)
    return gamma ** math.floor(seen / (every * total) + 1e-9)


def multistep(seen: float, total: float, *, milestones: tuple[float, ...] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Multiplied by `gamma` (>= 0) at each of `milestones`, which are fractions of the run in (0, 1)."""
    for milestone in milestones:
        _between_0_and_1(milestones=milestone)
    _not_negative(gamma=gamma)
    return gamma ** sum(seen >= at * total for at in milestones)


def trapezoid(seen: float, total: float, *, decay: float = 0.4, final: float = 0.0) -> float:
    """1, then a straight line to `final` (>= 0) over the last fraction `decay`, in (0, 1], of the run."""
    _fraction(decay=decay)
    _not_negative(final=final)
    start = (1.0 - decay) * total
    return 1.0 if seen < start else 1.0 + (final - 1.0) * (seen - start) / (total - start)


def _not_negative(**options: float) -> None:
    for name, value in options.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value:g}: give a number in [0, inf)")


def _between_0_and_1(**options: float) -> None:
    for name, value in options.items():
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name}={value:g}: give a number in (0, 1)")


def _fraction(**options: float) -> None:
    for name, value in options.items():
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name}={value:g}: give a number in (0, 1]")
