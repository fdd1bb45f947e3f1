"""The rows of metrics.jsonl: what a log point, an evaluation or an event leaves, one JSON object a line.

A row is flat: `kind`, `step` and figures named with their units. What the clock said stands under the one key `clock`,
so that two runs can be compared without it. A figure that is not finite is null in the file and NaN here.

Newer versions of dtrain may write keys that this one does not know, which are ignored, and kinds, which are passed by.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, TypeVar

from dtrain.files import finite

T = TypeVar("T")


class _Row:
    """What the three kinds have in common."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The row as metrics.jsonl has it, with its keys in order; a figure that is not finite is None."""
        told = {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]  # each kind is one
        return {name: finite(value) for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class TrainClock:
    """What the clock said at a log point. The first two are of the interval, the others since the run began."""

    images_per_second: float
    data_wait_fraction: float  # of the training time
    train_seconds: float
    cpu_seconds: float  # of this process
    left_seconds: float  # until the end of the run, at the speed of this interval
    time: float  # seconds since 1970


@dataclass(frozen=True)
class TrainRow(_Row):
    """The log interval that ends with `step`, summed over all processes."""

    kind: ClassVar[str] = "train"
    step: int  # updates done
    epoch: float
    samples: int  # images seen since the run began
    loss: float  # mean over the interval
    top1_fraction: float
    lr: float  # of the last step
    images_in_interval: int
    skipped_steps: int
    checksum: int  # of the samples and their augmentation: equal for equal data
    clock: TrainClock


@dataclass(frozen=True)
class EvalClock:
    """What the clock said after an evaluation."""

    eval_seconds: float  # since the run began
    time: float


@dataclass(frozen=True)
class EvalRow(_Row):
    """One evaluation of one kind of weights: exact counts over a split."""

    kind: ClassVar[str] = "eval"
    step: int
    epoch: float
    samples: int
    split: str  # "test" or "val"
    weights: str  # "raw" or "ema"
    hits: int  # images whose class came first
    hits5: int  # images whose class came among the first five
    images: int
    loss: float
    nonfinite_losses: int  # images that are no part of the mean loss
    clock: EvalClock


@dataclass(frozen=True)
class EventClock:
    """When an event happened."""

    time: float


@dataclass(frozen=True)
class EventRow(_Row):
    """Something that happened to the run after `step` updates: start, resume, save, stop or finish."""

    kind: ClassVar[str] = "event"
    event: str
    step: int
    processes: int | None = None  # of start and resume: how many there are from here on
    reason: str | None = None  # of stop
    clock: EventClock = dataclasses.field(kw_only=True)


Row: TypeAlias = TrainRow | EvalRow | EventRow
_KINDS: dict[str, type[TrainRow] | type[EvalRow] | type[EventRow]] = {
    kind.kind: kind for kind in (TrainRow, EvalRow, EventRow)
}
_CLOCKS = {"train": TrainClock, "eval": EvalClock, "event": EventClock}


def from_json(value: Any) -> Row | None:
    """The row that a JSON value stands for; None for a kind that this version does not know.

    Raises ValueError for what is no row: no object, no kind, no whole number as its step, or a figure missing.
    """
    if not isinstance(value, dict) or type(value.get("step")) is not int or not isinstance(value.get("kind"), str):
        raise ValueError("not a row")
    if (kind := _KINDS.get(value["kind"])) is None:
        return None
    try:
        clock: Any = _built(_CLOCKS[kind.kind], value["clock"])
        return _built(kind, {**value, "clock": clock})
    except (TypeError, KeyError) as error:
        raise ValueError("not a row") from error


def _built(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from its fields among `values`; null stands for a float that was not finite."""
    given = {f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}  # type: ignore[arg-type]
    floats = {f.name for f in dataclasses.fields(kind) if f.type == "float"}  # type: ignore[arg-type]
    return kind(**{name: math.nan if value is None and name in floats else value for name, value in given.items()})


def parsed(line: bytes) -> Row | None:
    """`from_json` of a line of metrics.jsonl. Raises ValueError for a line that is no row."""
    try:
        return from_json(json.loads(line))
    except RecursionError:
        raise ValueError("not a row") from None


def as_line(row: Row) -> bytes:
    """A row as a line of metrics.jsonl."""
    return json.dumps(row.to_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def comparable(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What two equal runs have in common: the train and eval rows as JSON, without `clock`."""
    told = [row.to_json() for row in rows if not isinstance(row, EventRow)]
    return [{name: value for name, value in row.items() if name != "clock"} for row in told]
