"""Trackers: services and files to which the metrics of a run are sent, such as wandb. dtrain's own are classes here.

A tracker runs in a process of its own (tracking.py), so if it is slow, hangs or fails, the run is not affected. It is
given the train and eval rows of metrics.jsonl in order of their `position`, from the first one that it does not hold
yet, so rows that a resume computes again are not added twice. Rows that it missed are still in metrics.jsonl, from
where `dtrain sync` sends them. Each tracker is an entry point, whose extra names the package that the tracker needs.
"""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

from dtrain import plugins
from dtrain.errors import ExitCode
from dtrain.files import write_json
from dtrain.plugins import Plugin
from dtrain.run.rows import EvalRow, TrainRow

Row: TypeAlias = TrainRow | EvalRow  # what a tracker is given
NOTHING = -1  # the position `held` of a tracker that holds no rows
INIT_SECONDS = 10.0  # how long wandb waits for its server, both for the key and for the run, before it works offline
STATE = "state.json"


@dataclass(frozen=True)
class State:
    """The state of a tracker between two sessions, kept in the file state.json of its folder.

    id: the run's name at the tracker's server. held: the position of the last row that the tracker has stored safely; a
    session that is killed leaves it unchanged. where: tells people how to look at the curves. error: why rows are
    missing, for the end of a sentence; None if none are.
    """

    id: str | None = None
    held: int = NOTHING
    where: str = ""
    error: str | None = None

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state in `folder`; that of a new tracker if the file does not exist or cannot be read."""
        try:
            return cls(**json.loads((folder / STATE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write the state into `folder`, completely or not at all. Raises OSError if it cannot be written."""
        write_json(folder / STATE, vars(self))


@dataclass(frozen=True)
class About:
    """What a tracker is told about a run: its name, all its settings, and facts from its record.

    facts: the environment, the versions, the plugins, and the values that settings given as `auto` took.
    """

    name: str
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]


class Tracker(Protocol):
    """One session with a tracker, created by `cls(folder, about, state, live=...)`. `folder` exists then.

    live: True while the run goes on; if the server cannot be reached, the tracker should then work offline. False in
    `dtrain sync`, where the user waits for the answer, so it should raise. An exception ends this tracker alone.
    A tracker may have an attribute `state: State`, which it has to write to disk before it does anything else. It then
    gets the rows after `state.held`; without the attribute, it gets the rows after those of the last session.
    """

    def write(self, row: Row) -> None:
        """Add a train or eval row."""
        ...

    def close(self, exit_code: int | None) -> State | None:
        """Store all rows safely, and return the new state; None means that all rows are stored.

        exit_code: the exit code of the run; None if it died without one.
        """
        ...


def find(names: Sequence[str]) -> list[Plugin]:
    """The trackers of `--track`, as plugins. Imports none of them, since they run in processes of their own.

    Raises PluginError for a name that is no tracker (with the nearest one that is), or whose package is not installed.
    """
    return [plugins.find("tracker", name) for name in names]


def position(row: Row) -> int:
    """A number that orders the rows, and is the same for a row that is computed again after a resume.

    Each step has three, for its train row, and its eval rows of the raw weights and of the EMA.
    """
    return 3 * row.step + (0 if isinstance(row, TrainRow) else 1 if row.weights == "raw" else 2)


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row by the names of their curves: train/loss, test/top1_fraction, val_ema/loss, ...

    The hits of an eval row become fractions. A number that is not finite is left out.
    """
    group, flat = "train", _flat(row)
    if isinstance(row, EvalRow):
        group = row.split if row.weights == "raw" else f"{row.split}_{row.weights}"
        flat |= {"top1_fraction": row.hits / row.images, "top5_fraction": row.hits5 / row.images}
    left_out = ("step", "checksum", "time", "hits", "hits5", "images")
    return {
        f"{group}/{name}": float(value)
        for name, value in flat.items()
        if name not in left_out and isinstance(value, int | float)
    }


def _flat(row: Row) -> dict[str, Any]:
    """A row's figures and those of its clock in one dictionary; a figure that is not finite is None."""
    told = row.to_json()
    clock = told.pop("clock")
    return {name: value for name, value in {**told, **clock}.items() if name != "kind"}


class Csv:
    """Writes the rows unchanged into train.csv and eval.csv. Each session writes both files anew."""

    def __init__(self, folder: Path, about: About, state: State, *, live: bool) -> None:
        self.state = replace(state, held=NOTHING, where=str(folder))
        self.state.write(folder)
        self._folder, self._held = folder, NOTHING
        self._files: dict[str, tuple[TextIO, csv.DictWriter[str]]] = {}

    def write(self, row: Row) -> None:
        flat = _flat(row)
        if row.kind not in self._files:
            begun = (self._folder / f"{row.kind}.csv").open("w", encoding="utf-8", newline="")
            self._files[row.kind] = (begun, csv.DictWriter(begun, list(flat), extrasaction="ignore"))
            self._files[row.kind][1].writeheader()
        file, writer = self._files[row.kind]
        writer.writerow(flat)
        file.flush()
        self._held = position(row)

    def close(self, exit_code: int | None) -> State:
        for file, _ in self._files.values():
            file.close()
        return replace(self.state, held=self._held)


class TensorBoard:
    """Writes scalars, and the settings for the HParams page, into an event file for each session.

    It uses TensorBoard's own writer, since torch's is the same but imports torch. A session begins with a START event,
    at which TensorBoard discards the events of earlier sessions from that step on, so rows written again show once.
    """

    def __init__(self, folder: Path, about: About, state: State, *, live: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        step = max(0, state.held // 3)  # some rows of this step may be missing, so all of them are written again
        self.state = replace(state, held=3 * step - 1, where=f"tensorboard --logdir {folder}")
        self.state.write(folder)
        self._held = state.held
        self._writer = EventFileWriter(str(folder))
        self._writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        settings = {name: _scalar(value) for name, value in about.settings.items()}
        self._writer.add_event(Event(step=step, summary=hparams_pb(settings, trial_id=about.name)))
        self._writer.flush()

    def write(self, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures(row).items()]
        self._writer.add_event(Event(step=row.step, wall_time=row.clock.time, summary=Summary(value=values)))
        self._writer.flush()
        self._held = position(row)

    def close(self, exit_code: int | None) -> State:
        self._writer.close()
        return replace(self.state, held=self._held)


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


class Wandb:
    """A wandb run, whose id is kept so that a resume continues it.

    The settings become wandb's config, and `step` is the x axis of every curve. wandb's own environment variables take
    precedence. The `position` of a row is used as wandb's internal step, which can only grow: a server accepts no row
    twice, and tells in `starting_step` how many it has. Offline, each session's folder gets all rows, so it is enough
    to run `wandb sync` on the newest folder; these rows count as not sent.
    """

    def __init__(self, folder: Path, about: About, state: State, *, live: bool) -> None:
        import wandb

        id_ = os.environ.get("WANDB_RUN_ID") or state.id or secrets.token_hex(4)
        replace(state, id=id_).write(folder)  # kept before the server learns of it
        asked = {
            "id": ("WANDB_RUN_ID", id_),
            "resume": ("WANDB_RESUME", "allow"),
            "project": ("WANDB_PROJECT", "dtrain"),
            "name": ("WANDB_NAME", about.name),
            "dir": ("WANDB_DIR", str(folder.parent)),  # wandb adds its name
        }
        given: dict[str, Any] = {name: value for name, (env, value) in asked.items() if not os.environ.get(env)}
        limit: dict[str, Any] = {}
        if live and not os.environ.get("WANDB_INIT_TIMEOUT"):
            limit["init_timeout"] = INIT_SECONDS
        # statistics of the machine are taken from the training process, so there are none after it has ended
        settings = wandb.Settings(console="off", x_stats_pid=os.getppid(), x_disable_stats=not live, **limit)
        reason = None
        try:
            self._run = wandb.init(**given, settings=settings)
        except Exception as error:  # no key, no network, no such project: whatever it is becomes the reason
            if not live:
                raise
            reason = f"it works offline: {' '.join(str(error).split()) or type(error).__name__}"
            wandb.teardown()  # ends wandb's service, which blocks this id while it still waits; takes a few seconds
            self._run = wandb.init(**given, settings=settings, mode="offline")
        self._sends = not (self._run.offline or self._run.disabled)
        if self._sends:
            where, held = self._run.url or "", self._run.starting_step - 1
        else:
            where, held = f"wandb sync {Path(self._run.dir).parent}", NOTHING
            reason = reason or f"WANDB_MODE is {self._run.settings.mode}"
        self.state = State(id_, held, where, reason)
        self.state.write(folder)
        self._held = held
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.config.update({**about.settings, "dtrain": dict(about.facts)}, allow_val_change=True)

    def write(self, row: Row) -> None:
        told = {"step": row.step, **figures(row), "_timestamp": row.clock.time}
        self._run.log(told, step=position(row), commit=True)
        if self._sends:
            self._held = position(row)

    def close(self, exit_code: int | None) -> State:
        if exit_code == ExitCode.STOPPED:  # a run that will be resumed; wandb calls it preempting
            self._run.mark_preempting()
        self._run.finish(exit_code=ExitCode.DEFECT if exit_code is None else exit_code)
        return replace(self.state, held=self._held)
