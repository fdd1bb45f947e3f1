"""How far a run has come and how its time was spent: the state in a checkpoint beside the learner's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dtrain.files import refuse_unknown_keys
from dtrain.run.checkpoint import STATE
from dtrain.run.rows import Best
from dtrain.world import Ask

KINDS = ("train", "eval", "save", "wait", "start-up")  # of time; "wait" is waiting for data and a part of "train"


@dataclass
class TrainState:
    """The state of a run beside that of its learner: the part `run` of a checkpoint's state.json."""

    step: int = 0  # updates done
    samples: int = 0  # images seen by all processes together
    tally: list[int] | None = None  # sums of the open log interval over all processes; None where it has just begun
    streak: int = 0  # updates skipped in a row up to now, under --on-nonfinite skip
    best: Best | None = None
    eval_due: bool = False  # the run was stopped when an evaluation was due; the resume begins with it
    reached: bool = False  # --stop-at-accuracy was met
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))

    def advance(self, batch_size: int) -> None:
        """Count one update, of `batch_size` images."""
        self.step += 1
        self.samples += batch_size

    def add(self, sums: list[int]) -> list[int]:
        """Add sums to the open log interval; returns its sums so far."""
        self.tally = sums if self.tally is None else [a + b for a, b in zip(self.tally, sums, strict=True)]
        return self.tally


def read_state(state: Mapping[str, Any]) -> tuple[TrainState, Mapping[str, Any]]:
    """The two parts of a checkpoint's state.json: the state of the run, and the learner's counts.

    Raises StorageError for a key that this version of dtrain does not know.
    """
    refuse_unknown_keys(STATE, state, ("run", "learner"))
    run = dict(state["run"])
    refuse_unknown_keys(STATE, run, (f.name for f in fields(TrainState)))
    if run["best"] is not None:
        refuse_unknown_keys(STATE, run["best"], (f.name for f in fields(Best)))
        run["best"] = Best(**run["best"])
    return TrainState(**run), state["learner"]


class Stopwatch:
    """Measures the time of training without evaluations and saves, in total and since the last lap.

    seconds: the totals by kind, to which it adds. waited: returns the seconds spent waiting for data so far.
    """

    def __init__(self, seconds: dict[str, float], waited: Callable[[], float]) -> None:
        self._seconds, self._waited = seconds, waited
        self._lap = [0.0, 0.0]
        self._go_on()

    def _go_on(self) -> None:
        self._since = (time.monotonic(), self._waited())

    def _count(self) -> None:
        spent = (time.monotonic() - self._since[0], self._waited() - self._since[1])
        for number, kind in enumerate(("train", "wait")):
            self._seconds[kind] += spent[number]
            self._lap[number] += spent[number]
        self._go_on()

    def lap(self) -> tuple[float, float]:
        """The seconds of training since the last lap and those of them spent waiting for data; begins a new lap."""
        self._count()
        train, wait = self._lap
        self._lap = [0.0, 0.0]
        return train, wait

    @contextlib.contextmanager
    def away(self, kind: str) -> Iterator[None]:
        """Count the time inside the `with` block as `kind` ("eval" or "save") and not as training."""
        self._count()
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[kind] += time.monotonic() - started
            self._go_on()


class RunClock:
    """Tells when a save (`--checkpoint-every 10min`) or a stop (`--max-time`) is due by the clock. Used on rank 0."""

    def __init__(self, save_seconds: float | None, limit_seconds: float | None) -> None:
        self._save_seconds, self._limit = save_seconds, limit_seconds
        self._started = self._saved = time.monotonic()
        self.reason = ""

    def saved(self) -> None:
        """Note that a checkpoint has just been written."""
        self._saved = time.monotonic()

    def ask(self) -> Ask:
        """What is due now; all processes act on it one step later."""
        now = time.monotonic()
        save = self._save_seconds is not None and now - self._saved >= self._save_seconds
        if save:
            self._saved = now  # so that it is asked for only once: `ask` is called again before the save is made
        stop = self._limit is not None and now - self._started >= self._limit
        if stop:
            self.reason = "--max-time"
        return Ask(save=save, stop=stop)
