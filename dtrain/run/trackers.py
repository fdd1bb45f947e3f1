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
from typing import Any, Protocol, TextIO

from dtrain import plugins
from dtrain.files import write_json
from dtrain.plugins import Plugin

Row = Mapping[str, Any]
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
        """The state in `folder`; that of a new tracker where there is none, or none that can be read."""
        try:
            return cls(**json.loads((folder / STATE).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write it to `folder`, whole or not at all. Raises OSError."""
        write_json(folder / STATE, vars(self))


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run: its name, every setting, and the environment, versions and `auto` values."""

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
    """A number that grows from row to row of a run and is the same for a row that is computed again.

    Each step has three of them: for its train row, its evaluation of the raw weights, and that of the EMA.
    """
    return 3 * int(row["step"]) + (0 if row["kind"] == "train" else 1 if row["weights"] == "raw" else 2)


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row, under the names of their curves: train/loss, test/top1_fraction, val_ema/loss, ...

    The counts of an eval row become fractions. A number that was not finite is null in a row, and is left out.
    """
    group, flat = "train", {**row, **row.get("clock", {})}
    if row["kind"] == "eval":
        group = row["split"] if row["weights"] == "raw" else f"{row['split']}_{row['weights']}"
        flat["top1_fraction"], flat["top5_fraction"] = (row[name] / row["images"] for name in ("hits", "hits5"))
    left_out = ("step", "checksum", "time", "hits", "hits5", "images")
    return {
        f"{group}/{name}": float(value)
        for name, value in flat.items()
        if name not in left_out and isinstance(value, int | float)
    }


def _time(row: Row) -> float:
    return float(row["clock"]["time"])


class Csv:
    """Writes the rows unchanged into train.csv and eval.csv. Each session writes both files anew."""

    def __init__(self, folder: Path, about: About, state: State, *, live: bool) -> None:
        self.state = replace(state, held=NOTHING, where=str(folder))
        self.state.write(folder)
        self._folder, self._held = folder, NOTHING
        self._files: dict[str, tuple[TextIO, csv.DictWriter[str]]] = {}

    def write(self, row: Row) -> None:
        flat = {name: value for name, value in {**row, **row["clock"]}.items() if name not in ("kind", "clock")}
        if row["kind"] not in self._files:
            begun = (self._folder / f"{row['kind']}.csv").open("w", encoding="utf-8", newline="")
            self._files[row["kind"]] = (begun, csv.DictWriter(begun, list(flat), extrasaction="ignore"))
            self._files[row["kind"]][1].writeheader()
        file, writer = self._files[row["kind"]]
        writer.writerow(flat)
        file.flush()
        self._held = position(row)

    def close(self, exit_code: int | None) -> State:
        for file, _ in self._files.values():
            file.close()
        return replace(self.state, held=self._held)


class TensorBoard:
    """Writes scalars, and the settings for the page HParams, into one event file for each session.

    It uses TensorBoard's own writer, since torch's would import torch. A session begins with a mark that makes
    TensorBoard drop what older files hold of that step and later, so that a session that was killed shows no row twice.
    """

    def __init__(self, folder: Path, about: About, state: State, *, live: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        step = max(0, state.held // 3)  # some rows of this step may be missing, so all of it is written again
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
        self._writer.add_event(Event(step=row["step"], wall_time=_time(row), summary=Summary(value=values)))
        self._writer.flush()
        self._held = position(row)

    def close(self, exit_code: int | None) -> State:
        self._writer.close()
        return replace(self.state, held=self._held)


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


class Wandb:
    """Sends rows to a run at wandb; a resume goes on with the same run, since its id is kept in the state.

    The settings become the run's config, and steps the horizontal axis of every curve. wandb's own environment
    variables win over what is chosen here. wandb's internal step, which may only grow, is the row's `position`: a
    server takes no row twice, and says in `starting_step` how far it is. A folder that was written offline holds all
    rows, so that `wandb sync` of the newest folder is enough; its rows count as not sent yet.
    """

    def __init__(self, folder: Path, about: About, state: State, *, live: bool) -> None:
        import wandb

        id_ = os.environ.get("WANDB_RUN_ID") or state.id or secrets.token_hex(4)
        replace(state, id=id_).write(folder)  # before a server may know it
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
        # the load of the machine is shown for the trainer's process, which is gone when rows are sent afterwards
        settings = wandb.Settings(console="off", x_stats_pid=os.getppid(), x_disable_stats=not live, **limit)
        reason = None
        try:
            self._run = wandb.init(**given, settings=settings)
        except Exception as error:  # no key, no network, no such project: the reason is kept and told
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
        told = {"step": row["step"], **figures(row), "_timestamp": _time(row)}
        self._run.log(told, step=position(row), commit=True)
        if self._sends:
            self._held = position(row)

    def close(self, exit_code: int | None) -> State:
        if exit_code == 75:  # the run stopped to go on later, which wandb calls preempting
            self._run.mark_preempting()
        self._run.finish(exit_code=1 if exit_code is None else exit_code)
        return replace(self.state, held=self._held)
