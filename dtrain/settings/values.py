"""Conversion of text, TOML values and Python values to checked values of an annotated type.

It is used both for settings and for the options of plugins.

value_of   converts to an annotated type (int, Literal, tuple of floats, ...), or raises Unfit, which says what to give
setting    one field of a panel: default, help, bounds, flags
Panel      a frozen dataclass of settings, valid from the moment it exists
Every      an interval of a run: so many steps, epochs or seconds

A new kind of value is a class with a `parse` method, which `value_of` calls, and a `__str__` that `parse` reads back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from dtrain.errors import UsageError, nearest

Check = Callable[[Any], None]  # raises Unfit for a value that is out of bounds


class Unfit(ValueError):
    """A value that does not fit its type or its bounds. The message says what to give instead."""


# -- the engine --------------------------------------------------------------------------------------------------------


def value_of(hint: Any, given: Any) -> Any:
    """`given` as a value of the type `hint`. Text is read as on a command line, other values as from TOML.

    hint: bool, int, float, str, Path, Literal, a union (the first member that fits; "none" is None where that is a
    member), tuple, list or Sequence (comma-separated as text), dict[str, str] (key=value as text), or a class with a
    `parse` method. Anything else is taken as text. Raises Unfit.
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _of_union(members, given)
    if origin is Literal:
        fitting = [choice for choice in members if str(choice) == str(given)]
        if not fitting:
            raise Unfit(f"not a choice; {nearest(str(given), map(str, members))}")
        return fitting[0]
    if origin in (tuple, list, Sequence):
        return _sequence_of(origin, members, given)
    if origin is dict:
        return _options(given)
    parse: Callable[[Any], Any] | None = getattr(hint, "parse", None)
    if parse is not None:
        return given if isinstance(given, hint) else parse(given)
    convert: Callable[[Any], Any] = _PLAIN.get(hint, _text)
    return convert(given)


def _of_union(members: Sequence[Any], given: Any) -> Any:
    if type(None) in members and (given is None or str(given).lower() == "none"):
        return None
    refused: Unfit | None = None
    for member in members:
        if member is not type(None):
            try:
                return value_of(member, given)
            except Unfit as error:
                refused = refused or error
    raise refused or Unfit("give none")


def _sequence_of(origin: Any, members: Sequence[Any], given: Any) -> Any:
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else [given]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    parts = [part for part in parts if part != ""]
    if origin is tuple and Ellipsis not in members and members:
        if len(parts) != len(members):
            raise Unfit(f"give {len(members)} values, comma-separated")
        return tuple(value_of(member, part) for member, part in zip(members, parts, strict=True))
    values = (value_of(members[0] if members else str, part) for part in parts)
    return list(values) if origin is list else tuple(values)


def _bool(given: Any) -> bool:
    if str(given).lower() not in ("true", "false"):
        raise Unfit("give true or false")
    return str(given).lower() == "true"


def _number(kind: type[int] | type[float], given: Any) -> int | float:
    try:
        number = kind(given)
        if isinstance(given, bool) or (kind is int and isinstance(given, float) and given != number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise Unfit(f"give a {'whole ' if kind is int else ''}number") from None
    return number


def _text(given: Any) -> str:
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)  # a file may say name = 7
    if not isinstance(given, str | Path):
        raise Unfit("give text")
    return str(given)


def _path(given: Any) -> str:
    text = _text(given)
    if "\0" in text:
        raise Unfit("give a path, which holds no zero byte")
    return text


def _options(given: Any) -> dict[str, str]:
    """Options as text by key: from the command line's ["key=value", ...], or from a table of TOML."""
    if isinstance(given, Mapping):
        return {str(key): _option_text(value) for key, value in given.items()}
    pairs = {}
    if not isinstance(given, str | list | tuple):
        raise Unfit("give key=value, or a table")
    for item in [given] if isinstance(given, str) else given:
        key, equals, text = str(item).partition("=")
        if not equals or not key:
            raise Unfit("give key=value")
        pairs[key.strip()] = text.strip()
    return pairs


def _option_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ",".join(_option_text(item) for item in value)
    return str(value)


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: functools.partial(_number, int),
    float: functools.partial(_number, float),
    str: _text,
    Path: lambda given: Path(_path(given)).expanduser(),
}


# -- bounds ------------------------------------------------------------------------------------------------------------


def above(low: float) -> Check:
    """Numbers greater than `low`."""
    return _check(lambda value: value > low, f"give a number greater than {low:g}")


def at_least(low: float) -> Check:
    """Numbers from `low` on."""
    return _check(lambda value: value >= low, f"give a number {low:g} or greater")


def within(interval: str) -> Check:
    """Numbers of an interval as mathematicians write it: "[0, 1)" includes 0 and excludes 1."""
    low, high = map(float, interval[1:-1].split(","))
    kind = "fraction" if high <= 1 else "number"

    def inside(value: float) -> bool:
        return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")

    return _check(inside, f"give a {kind} in {interval}")


def numbers(counts: Sequence[int], *ranges: tuple[float, float], give: str) -> Check:
    """Tuples of as many numbers as `counts` allows, the i-th from the i-th of `ranges`, both ends included."""

    def inside(values: Sequence[float]) -> bool:
        return len(values) in counts and all(low <= v <= high for v, (low, high) in zip(values, ranges, strict=False))

    return _check(inside, f"give {give}")


def _check(holds: Callable[[Any], bool], otherwise: str) -> Check:
    def check(value: Any) -> None:
        if not holds(value):
            raise Unfit(otherwise)

    return check


# -- settings and panels -----------------------------------------------------------------------------------------------


def setting(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    flags: tuple[str, ...] = (),
    place: bool = False,
    of: str | None = None,
    whole: Callable[[Any], Any] | None = None,
) -> Any:
    """One setting, as a field of a panel; its annotation is its type, and a Literal lists its choices.

    help: the text in `--help`, with the unit. place: the setting says where or how a run is computed and does not
    affect its results. flags: its flags, if they are not just `--name`. of: the setting that this one depends on; where
    that is chosen anew, such as another optimizer, this one starts from its default (see layers.py). whole: completes a
    short form of the value, so that the short and the complete form name the same run.
    """
    about = {"help": help, "check": check, "flags": flags, "place": place, "of": of, "whole": whole}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Setting:
    """What is known of one setting; `kind` is its type without `| None`."""

    name: str
    panel: type[Panel]
    kind: Any
    optional: bool
    default: Any
    help: str
    check: Check | None
    flags: tuple[str, ...]
    place: bool
    of: str | None
    whole: Callable[[Any], Any] | None

    def value(self, given: Any) -> Any:
        """`given` as a value of this setting. Raises UsageError that names the flag and says what to give."""
        value = given
        try:
            value = value_of(self.kind, given)
            parts = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in parts if isinstance(number, float)):
                raise Unfit("give a finite number")
            if self.check is not None:
                self.check(value)
        except Unfit as error:
            raise UsageError(f"{flag_of(self.name)} {_shown(given, value)}: {error}") from None
        return self.whole(value) if self.whole is not None else value


def _shown(given: Any, value: Any) -> str:
    value = given if isinstance(given, str) else value
    if isinstance(value, tuple) and all(isinstance(part, int | float) for part in value):
        return ",".join(f"{number:g}" for number in value)
    return str(value)


class Panel:
    """Base of the panels. Creating one converts and checks every value in it. Raises UsageError."""

    title: ClassVar[str]  # the heading under which `--help` lists its flags
    attribute: ClassVar[str]  # its name in TrainConfig

    def __post_init__(self) -> None:
        for known in settings_of(type(self)):
            if (value := getattr(self, known.name)) is not None:
                object.__setattr__(self, known.name, known.value(value))
        self.check()

    def check(self) -> None:
        """Raise UsageError where two settings do not go together."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The panel with its own settings among `values` (by name), and defaults for those that are missing."""
        return cls(**{known.name: values[known.name] for known in settings_of(cls) if known.name in values})


def settings_of(panel: type[Panel]) -> tuple[Setting, ...]:
    """The settings of a panel, which is a class derived from Panel, in the order of its fields."""
    hints, found = get_type_hints(panel), []
    for f in dataclasses.fields(panel):  # type: ignore[arg-type]  # every panel is a dataclass
        members = get_args(hints[f.name])
        optional = type(None) in members and get_origin(hints[f.name]) is not dict
        kind = next(m for m in members if m is not type(None)) if optional else hints[f.name]
        default = {} if f.default is dataclasses.MISSING else f.default
        found.append(Setting(f.name, panel, kind, optional, default, **f.metadata))
    return tuple(found)


def checked(settings: Mapping[str, Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, by the names of their settings, converted and checked.

    Raises UsageError for a value that does not fit, and for an unknown name, with the nearest known one.
    """
    if unknown := next((name for name in values if name not in settings), None):
        raise UsageError(f"{unknown} is not a setting; {nearest(unknown, settings)}")
    return {name: settings[name].value(value) for name, value in values.items()}


def flag_of(name: str) -> str:
    """The long flag of a setting: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """A value in the types of JSON and TOML: paths, intervals and spans as text, tuples as lists."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if hasattr(value, "plain"):
        return value.plain
    return value if isinstance(value, bool | int | float | str | dict) else str(value)


# -- intervals and spans -----------------------------------------------------------------------------------------------

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Every:
    """An interval of a run, in steps, epochs or seconds; if all three are None, "only at the end"."""

    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, given: Any) -> Every:
        """From "500steps", "1epoch", "10min" or "end". Raises Unfit."""
        text = str(given).strip()
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(steps?|epochs?|s|sec|min|h)", text)
        if text == "end":
            return cls()
        if match and (amount := float(match[1])) > 0:
            unit = match[2].removesuffix("s") or "s"
            if unit == "step" and amount == int(amount):
                return cls(steps=int(amount))
            if unit == "epoch":
                return cls(epochs=amount)
            if match[2] in _UNITS:
                return cls(seconds=amount * _UNITS[match[2]])
        raise Unfit("not an interval; give 500steps, 1epoch, 10min or end")

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps}steps"
        if self.epochs is not None:
            return f"{self.epochs:g}epoch"
        return "end" if self.seconds is None else f"{self.seconds:g}s"


def without_clock(every: Every) -> None:
    """Raise Unfit for an interval in seconds, which would be due at different steps in different runs."""
    if every.seconds is not None:
        raise Unfit("not an interval; give 500steps, 1epoch or end")


@dataclass(frozen=True)
class Span:
    """A span of time, in seconds."""

    seconds: float

    @classmethod
    def parse(cls, given: Any) -> Span:
        """From "90s", "45min" or "2h". Raises Unfit."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(s|sec|min|h)", str(given).strip())
        if match is None:
            raise Unfit("not a span of time; give 90s, 45min or 2h")
        return cls(float(match[1]) * _UNITS[match[2]])

    def __str__(self) -> str:
        return f"{self.seconds:g}s"
