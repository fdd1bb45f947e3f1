"""Learning-rate schedules: how the factor of a step follows from a schedule plugin and from the warm-up before it.

A schedule is `f(seen, total, **options) -> factor`: a pure function of how many of the run's samples are done, so that
nothing is stepped, nothing is saved, and a resume cannot be off by one.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.errors import PluginError, UsageError
from dtrain.plugins import find, load, parse_options

Schedule = Callable[[float, float], float]
GIVE = "a factor of the learning rate is a finite number that is not negative"


def chosen_schedule(name: str, options: Mapping[str, str], *, total: float) -> Schedule:
    """The schedule plugin `name` with its options, checked once at the beginning of a run of `total` samples.

    options: as text, typed by the function's annotations. Raises PluginError for a schedule that is not there, cannot
    be imported, fails or gives what is no factor; UsageError for an option that it does not take or has no use for.
    """
    plugin = find("schedule", name)
    function, what = load(plugin), f"schedule {name}"
    bound = functools.partial(function, **parse_options(function, options, what=what))
    try:
        first = bound(0, total)
    except (ValueError, TypeError) as error:  # TypeError: an option without a default was not given
        raise UsageError(f"{what}: {error}") from error
    except Exception as error:
        raise PluginError(f"{plugin.said} fails at the start of the run: {type(error).__name__}: {error}") from error
    if not is_factor(first):
        raise PluginError(f"{plugin.said} gives {first!r} at the start of the run; {GIVE}")
    return bound


def factor(schedule: Schedule, seen: int, total: int, *, warmup: int, batch: int) -> float:
    """The factor of the learning rate for a step of `batch` samples that begins with `seen` of `total` samples done.

    While `seen` < `warmup` (0 <= warmup < total) it rises in a straight line towards the value with which the schedule
    starts, and is above 0 from the first step on if that value is; the schedule itself is stretched over the samples
    that remain after the warm-up. Raises PluginError for a value that is not finite or negative.
    """
    value = schedule(max(0, seen - warmup), total - warmup)
    if not is_factor(value):
        raise PluginError(f"the schedule gives {value!r} after {seen} of {total} samples; {GIVE}")
    value = float(value)  # of a schedule that computes with numpy
    return (seen + batch) / (warmup + batch) * value if seen < warmup else value


def is_factor(value: Any) -> bool:
    """Whether a value can multiply a learning rate: a number that is finite and not negative."""
    return isinstance(value, numbers.Real) and 0 <= float(value) < math.inf
