"""The rows of metrics.jsonl: one JSON object a line, for each log point, evaluation and event of a run.

A row has `kind`, `step` and figures named with their units. Times and speeds stand under the one key `clock`, so that
two runs can be compared without them. A figure that is not finite is null in the file and NaN here.

Newer versions of dtrain may write keys and kinds of rows that this version does not know; both are ignored.
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
    """The base of the three kinds of rows."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in metrics.jsonl, with its keys in order; a figure that is not finite is None."""
        told = {"kind": self.kind, **dataclasses.asdict(self)}  # type: ignore[call-overload]  # each kind is one
        return {name: finite(value) for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class TrainClock:
    """Times and speeds at a log point. The first two are of the log interval, the seconds are since the run began."""

    images_per_second: float
    data_wait_fraction: float  # part of the training time that was spent waiting for data
    train_seconds: float
    cpu_seconds: float  # of this process
    left_seconds: float  # until the end of the run, at the speed of this interval
    time: float  # seconds since 1970


@dataclass(frozen=True)
class TrainRow(_Row):
    """The training in the log interval that ends with `step`, over all processes."""

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
    """Times after an evaluation."""

    eval_seconds: float  # since the run began
    time: float


@dataclass(frozen=True)
class EvalRow(_Row):
    """One evaluation: exact counts over a split, for one kind of weights."""

    kind: ClassVar[str] = "eval"
    step: int
    epoch: float
    samples: int
    split: str  # "test" or "val"
    weights: str  # "raw" or "ema"
    hits: int  # images whose class has the largest logit (top-1)
    hits5: int  # images whose class is among the five largest logits (top-5)
    images: int
    loss: float
    nonfinite_losses: int  # images that are not in the mean loss
    clock: EvalClock


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its step, split and kind of weights ("raw" or "ema"), and its counts."""

    step: int
    split: str
    weights: str
    hits: int
    images: int


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
    processes: int | None = None  # for start and resume: the number of processes from here on
    reason: str | None = None  # for stop
    clock: EventClock = dataclasses.field(kw_only=True)


Row: TypeAlias = TrainRow | EvalRow | EventRow
_KINDS: dict[str, type[TrainRow] | type[EvalRow] | type[EventRow]] = {
    kind.kind: kind for kind in (TrainRow, EvalRow, EventRow)
}
_CLOCKS = {"train": TrainClock, "eval": EvalClock, "event": EventClock}


def from_json(value: Any) -> Row | None:
    """The row in a JSON value; None for a kind of row that this version does not know.

    Raises ValueError for a value that is not a row: not an object, or one without a kind, without a whole number as its
    step, or without one of its figures.
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
    """A dataclass from those of `values` that are its fields; null becomes NaN where the field is a float."""
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
    """The part of the rows that is the same in two equal runs: the train and eval rows as JSON, without `clock`."""
    told = [row.to_json() for row in rows if not isinstance(row, EventRow)]
    return [{name: value for name, value in row.items() if name != "clock"} for row in told]
