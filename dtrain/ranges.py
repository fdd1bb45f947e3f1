"""What the values of settings may be: numbers in ranges, lists of them, intervals of a run, spans of time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.errors import UsageError

_POSITIVE = (
    "lr",
    "batch_size",
    "epochs",
    "grad_accum_steps",
    "eval_batch_size",
    "log_interval",
    "dist_timeout",
    "steps",
    "clip_grad",
    "head_lr",
)
_NOT_NEGATIVE = ("weight_decay", "warmup_epochs", "shift", "cutout", "threads", "keep", "seed")
_INTERVALS = {  # name: (lowest, lowest allowed, highest, highest allowed)
    "momentum": (0.0, True, 1.0, False),
    "smoothing": (0.0, True, 1.0, False),
    "layer_decay": (0.0, False, 1.0, True),
    "ema": (0.0, False, 1.0, False),
    "val_split": (0.0, False, 1.0, False),
    "stop_at_accuracy": (0.0, False, 1.0, True),
    "erase": (0.0, True, 1.0, True),
    "mixup": (0.0, True, 100.0, True),
    "cutmix": (0.0, True, 100.0, True),
}
_LISTS: dict[str, tuple[tuple[int, ...], tuple[tuple[float, float], ...], str]] = {
    # name: (how many numbers, lowest and highest of each, what to give)
    "mean": ((1, 3), ((0, 1),) * 3, "one number in 0..1 a channel, such as 0.49,0.48,0.45"),
    "std": ((1, 3), ((0, 1),) * 3, "one number in 0..1 a channel, such as 0.25,0.24,0.26"),
    "scale": ((1, 2), ((0.01, 1),) * 2, "the least and the largest fraction of the area, in 0.01..1, such as 0.35,1"),
    "jitter": ((1, 3), ((0, 1),) * 3, "one or three fractions in 0..1, such as 0.4,0.4,0.4"),
    "affine": (
        (1, 2, 3, 4),
        ((0, 180), (0, 1), (0, 0.9), (0, 60)),
        "up to four numbers: degrees in 0..180, fraction in 0..1, zoom in 0..0.9, shear in 0..60, such as 15,0.1,0.1,5",
    ),
}


def flag_of(name: str) -> str:
    """The long flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raise UsageError for the first value, by name of its field, that is out of its range; says what to give."""
    _check_numbers(values)
    _check_lists(values)
    parse_every(values["eval_every"], "--eval-every", clock=False)
    parse_every(values["checkpoint_every"], "--checkpoint-every", clock=True)
    if values["max_time"] is not None:
        parse_seconds(values["max_time"], "--max-time")


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name in _POSITIVE + _NOT_NEGATIVE:
        value = values[name]
        if value is not None and (value < 0 or (value == 0 and name in _POSITIVE)):
            least = "greater than 0" if name in _POSITIVE else "0 or greater"
            raise UsageError(f"{flag_of(name)} {value}: give a number {least}")
    for name, (low, low_in, high, high_in) in _INTERVALS.items():
        value = values[name]
        inside = value is None or (low < value < high) or (value == low and low_in) or (value == high and high_in)
        if not inside:
            interval = f"{'[' if low_in else '('}{low:g}, {high:g}{']' if high_in else ')'}"
            what = "fraction" if high <= 1 else "number"
            raise UsageError(f"{flag_of(name)} {value}: give a {what} in {interval}")
    run_name = values["name"]
    if run_name is not None and (not run_name or Path(run_name).name != run_name):
        raise UsageError(f"--name {run_name}: give a plain name; --output takes a path")


def _check_lists(values: Mapping[str, Any]) -> None:
    for name, (counts, ranges, give) in _LISTS.items():
        value = values[name]
        if value is None:
            continue
        inside = all(low <= number <= high for number, (low, high) in zip(value, ranges, strict=False))
        if len(value) not in counts or not inside or (name == "scale" and value[0] > value[-1]):
            raise UsageError(f"{flag_of(name)} {','.join(f'{number:g}' for number in value)}: give {give}")
    if values["std"] is not None and 0.0 in values["std"]:
        raise UsageError(f"--std {values['std']}: give numbers greater than 0")


@dataclass(frozen=True)
class Every:
    """An interval of a run: exactly one of the three, or none of them for 'only at the end'."""

    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None


_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


def parse_every(text: str, flag: str, *, clock: bool) -> Every:
    """'500steps', '1epoch', '10min' (where the clock may decide) or 'end'. Raises UsageError naming `flag`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(steps?|epochs?|s|sec|min|h)", text.strip())
    if text.strip() == "end":
        return Every()
    unit = match.group(2).rstrip("s") if match else ""
    amount = float(match.group(1)) if match else 0.0
    if match and amount > 0:
        if unit == "step" and amount == int(amount):
            return Every(steps=int(amount))
        if unit == "epoch":
            return Every(epochs=amount)
        if clock and match.group(2) in _UNITS:
            return Every(seconds=amount * _UNITS[match.group(2)])
    examples = "500steps, 1epoch, 10min or end" if clock else "500steps, 1epoch or end"
    raise UsageError(f"{flag} {text}: not an interval; give {examples}")


def parse_seconds(text: str, flag: str) -> float:
    """A span of time with its unit ('90s', '45min', '2h') in seconds. Raises UsageError naming `flag`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|sec|min|h)", text.strip())
    if match is None:
        raise UsageError(f"{flag} {text}: not a span of time; give 90s, 45min or 2h")
    return float(match.group(1)) * _UNITS[match.group(2)]
