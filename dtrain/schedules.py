"""Learning-rate schedules: computes the factor of the learning rate for a step, from a schedule plugin and a warm-up.

A schedule is a pure function `f(seen, total, **options) -> factor` of the number of samples seen so far. It has no
state, so nothing has to be stepped or saved, and a resumed run cannot be off by one.
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
    """The schedule plugin `name` with its options bound, after one call for the start of a run of `total` samples.

    options: as text, converted by the function's annotations. Raises PluginError for a schedule that is not installed,
    cannot be imported, fails or returns what is not a factor; UsageError for an option that the schedule does not have
    or a value that it refuses.
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
    """The factor of the learning rate for a step of `batch` samples that begins after `seen` of `total` samples.

    warmup: samples of the warm-up, 0 <= warmup < total. While `seen` < `warmup`, the factor rises linearly towards
    the first value of the schedule, and is above 0 in the first step if that value is. The schedule is stretched over
    the samples after the warm-up. Raises PluginError if the schedule's value is negative or not finite.
    """
    try:
        value = schedule(max(0, seen - warmup), total - warmup)
    except Exception as error:
        raise PluginError(
            f"the schedule fails after {seen} of {total} samples: {type(error).__name__}: {error}"
        ) from error
    if not is_factor(value):
        raise PluginError(f"the schedule gives {value!r} after {seen} of {total} samples; {GIVE}")
    value = float(value)  # a schedule may return a numpy scalar
    return (seen + batch) / (warmup + batch) * value if seen < warmup else value


def is_factor(value: Any) -> bool:
    """Whether a value can be a factor of the learning rate: a finite number that is not negative."""
    return isinstance(value, numbers.Real) and 0 <= float(value) < math.inf
