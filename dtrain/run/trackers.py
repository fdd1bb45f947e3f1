"""Trackers: where the rows of metrics.jsonl are sent as well. Those that come with dtrain are classes here.

A tracker runs in a process of its own (tracking.py), so it may be slow, raise, hang or die without the run noticing.
It is given the train and eval rows in order of their `position`, beginning after the last row that it holds, so that a
resume, which computes equal rows again, adds none of them twice. Rows that it missed are still in metrics.jsonl, from
where `dtrain sync` sends them. Each is an entry point; the extra in it names the package that it needs.
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
NOTHING = -1  # the position before every row
INIT_SECONDS = 10.0  # wandb waits so long for its server, for the key and again for the run; then it works offline
STATE = "state.json"


@dataclass(frozen=True)
class State:
    """What is kept of a tracker between two sessions, in the file state.json of its folder.

    id: the run's name at the tracker's server. held: the position of the last row that is safe there; a session that is
    killed leaves it unchanged. where: tells people how to look at the curves. error: why rows are missing, as the end
    of a sentence.
    """

    id: str | None = None
    held: int = NOTHING
    where: str = ""
    error: str | None = None

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state in `folder`; that of a new tracker where the file does not exist or cannot be read."""
        try:
            return cls(**json.loads((folder / STATE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write it into `folder`, whole or not at all. Raises OSError if the disk refuses."""
        write_json(folder / STATE, vars(self))


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run: its name, all its settings, and the environment, versions and `auto` values."""

    name: str
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]


class Tracker(Protocol):
    """One session with a tracker. It is built by `cls(folder, about, state, live=...)`, where `folder` exists.

    live: a run goes on beside it, so that it should make do without a server; else the user waits for an answer.
    Whatever it raises ends this tracker alone. It may have an attribute `state: State`, which it has written to disk
    before it touches anything else: where it begins. It then gets the rows after `state.held`; without the attribute,
    those after the last that the session before it held.
    """

    def write(self, row: Row) -> None:
        """Take a train or eval row."""
        ...

    def close(self, exit_code: int | None) -> State | None:
        """Return when the rows are safe: how far, or None if all are. exit_code: of the run, None if it died."""
        ...


def find(names: Sequence[str]) -> list[Plugin]:
    """The trackers of `--track`, as plugins. Imports none of them, since they run in processes of their own.

    Raises PluginError for a name that is no tracker, with the nearest that is, and for a package that is not installed.
    """
    return [plugins.find("tracker", name) for name in names]


def position(row: Row) -> int:
    """A number that grows from row to row, equal for a row computed again: three a step, for train, raw and EMA."""
    return 3 * row.step + (0 if isinstance(row, TrainRow) else 1 if row.weights == "raw" else 2)


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row by the names of their curves: train/loss, test/top1_fraction, val_ema/loss, ...

    The counts of an eval row become fractions. What is not finite is left out.
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
    """A row's figures and those of its clock in one dictionary; what is not finite is None."""
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
    """Writes scalars, and the settings for the HParams page, into one event file a session.

    It uses TensorBoard's own writer, since torch's does the same and imports torch. A session begins with a mark that
    voids all earlier events of its first step and later ones, so that rows of a session that was killed show once.
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

    The settings become its config, and every curve is over steps. wandb's own environment variables take precedence.
    The `position` of a row is wandb's internal step, which only grows: a server takes no row twice, and tells in
    `starting_step` how far it is. An offline folder gets all rows, so that `wandb sync` of the newest folder is enough;
    its rows count as not sent.
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
        # the machine statistics are those of the trainer, so there are none when it has ended
        settings = wandb.Settings(console="off", x_stats_pid=os.getppid(), x_disable_stats=not live, **limit)
        reason = None
        try:
            self._run = wandb.init(**given, settings=settings)
        except Exception as error:  # no key, no network, no such project: whatever it is becomes the reason
            if not live:
                raise
            reason = f"it works offline: {' '.join(str(error).split()) or type(error).__name__}"
            wandb.teardown()  # ends its service, which holds the id while it waits for an answer; takes a few seconds
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
        if exit_code == ExitCode.STOPPED:  # wandb's word for a run that is to go on
            self._run.mark_preempting()
        self._run.finish(exit_code=ExitCode.DEFECT if exit_code is None else exit_code)
        return replace(self.state, held=self._held)
