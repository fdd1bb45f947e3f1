"""The run directory as the training loop sees it: every process has a Recorder, and only that of rank 0 writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain import plugins
from dtrain.config import TrainConfig, read_config
from dtrain.errors import DataError, StorageError, UsageError, exit_code_of
from dtrain.run import checkpoint
from dtrain.run.console import Console, three_ways
from dtrain.run.rows import EventClock, EventRow, Row
from dtrain.run.rundir import (
    CONFIG,
    Record,
    RunDir,
    check_writable,
    environment,
    open_run,
    read_record,
    read_rows,
    versions,
)
from dtrain.run.tracking import Tracking

WHERE = ("output", "name", "resume", "recipe")  # settings that say how a run is found and are no part of it
HELD_ROWS = 10_000  # most rows, some megabytes, that wait in memory while the disk is full


class Recorder:
    """The run directory, its record and its trackers. Where `folder` is None, as on every rank but 0, it does nothing.

    A row that a full disk refuses is held in memory and written, in order, before the next row; `flush` raises instead.
    track: names of trackers, which have been checked.
    """

    def __init__(self, path: Path, folder: RunDir | None, record: Record, track: Sequence[str] = ()) -> None:
        self.path = path
        self.folder = folder
        self.record = record
        self._tracking = Tracking(path, track)
        self._held: list[Row] = []

    def update(self, **changed: Any) -> None:
        """Change fields of run.json."""
        if self.folder is not None:
            self.record = replace(self.record, **changed)
            self.folder.write_record(self.record)

    def row(self, row: Row) -> None:
        """Add a row to metrics.jsonl. Raises StorageError once more than HELD_ROWS are held."""
        if self.folder is None:
            return
        self._held.append(row)
        try:
            self._write_held()
        except StorageError:
            if len(self._held) > HELD_ROWS:
                raise

    def _write_held(self) -> None:
        while self._held and self.folder is not None:
            self.folder.append(self._held[0])
            self._tracking.row(self._held.pop(0))

    def flush(self) -> None:
        """Write the held rows and make all survive a power cut. Call it before each checkpoint. Raises StorageError."""
        if self.folder is not None:
            self._write_held()
            self.folder.sync()

    def event(self, name: str, step: int, *, processes: int | None = None, reason: str | None = None) -> None:
        """Add an event row: start and resume with `processes`, save, stop with `reason`, or finish."""
        self.row(EventRow(name, step, processes, reason, clock=EventClock(time.time())))

    def rows(self) -> list[Row]:
        """The rows written so far."""
        return read_rows(self.path) if self.folder is not None else []

    def failed(self, error: Exception) -> None:
        """Write into run.json how the run ended. Raises no StorageError, since `error` matters more."""
        with contextlib.suppress(StorageError):
            self.update(status="failed", exit_code=exit_code_of(error), reason=f"{type(error).__name__}: {error}")

    def close(self, console: Console) -> None:
        """Give the trackers a few seconds to end, print how each ended, and release the directory."""
        for line, fell_short in self._tracking.close():
            (console.warn if fell_short else console.line)(line)
        if self.folder is not None:
            self.folder.close()


def path_of(config: TrainConfig) -> Path:
    """The run directory that `config` names. With `--resume none` the run may get `<it>-2` or a later one instead."""
    if config.resume not in ("auto", "none"):
        given = Path(config.resume)
        return given.parent.parent if given.parent.name == checkpoint.FOLDER else given
    return config.output or Path("runs") / config.run_name()


def _check_resume(config: TrainConfig) -> None:
    """Raise UsageError where `--resume PATH` names another directory than `--output`, or a checkpoint set aside."""
    if config.resume in ("auto", "none"):
        return
    path, asked = path_of(config), Path(config.resume)
    own = Path(config.origin("output")).resolve() == (path / CONFIG).resolve()  # where the run stood when it began
    if config.output is not None and not own and config.output.resolve() != path.resolve():
        raise UsageError(
            f"--resume {asked} --output {config.output}: a run goes on in its own directory; leave --output out, or "
            "begin a new run there without --resume"
        )
    if asked.parent.name == checkpoint.FOLDER and (name := asked.name.partition(".")[0]) != asked.name:
        taken = f"move {name} away, then " if (asked.parent / name).exists() else ""
        raise UsageError(
            f"--resume {asked}: this checkpoint has been set aside; to go on from it, {taken}rename it to {name} and "
            "resume from that"
        )


def resolved_before(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The values that settings given as `auto` took when this run began, for a resume to keep; empty for a new run.

    The number of threads is kept only if the number of processes is the same, since another divides the cores anew.
    Raises StorageError if the directory cannot be written, before any work is done for it, and UsageError if
    `--resume PATH` cannot be honoured.
    """
    _check_resume(config)
    path, fresh = path_of(config), config.resume == "none"
    check_writable(path.parent if fresh and path.exists() else path)  # a directory that is taken is left alone
    record = None if fresh else read_record(path)
    if record is None:
        return {}
    kept = {"amp_dtype": record.resolved.get("amp_dtype")}
    if record.resolved.get("world_size") == world_size:
        kept["threads"] = record.resolved.get("threads")
    return kept


def open_recorder(config: TrainConfig, *, main: bool, command: Sequence[str], resolved: Mapping[str, Any]) -> Recorder:
    """On the main process, own the run directory and write its config.toml and run.json; elsewhere touch nothing.

    resolved: the values that settings given as `auto` took.
    Raises UsageError for a directory that is in use, holds a run with other settings, or is to be resumed and does
    not exist; StorageError if it cannot be read or written.
    """
    path = path_of(config)
    if not main:
        return Recorder(path, None, Record("running"))
    if config.resume not in ("auto", "none") and read_record(path) is None:
        raise UsageError(f"--resume {config.resume}: no run is there; give a run directory, auto or none")
    folder = open_run(path, fresh=config.resume == "none")
    try:
        before = read_record(folder.path)
        if before is not None:
            _refuse_other_settings(folder.path, config)
        folder.write_config(config.settings())
        chosen: tuple[tuple[plugins.Kind, str], ...] = (
            ("architecture", config.arch),
            ("optimizer", config.opt),
            ("schedule", config.schedule),
        )
        found = [plugins.find(kind, name) for kind, name in chosen]
        record = Record(
            status="running",
            step=before.step if before else 0,
            last_checkpoint=before.last_checkpoint if before else None,
            command=list(command),
            environment=environment(),
            versions=versions(),
            resolved=dict(resolved),
            plugins={plugin.kind: plugins.identity(plugin) for plugin in found},
        )
        folder.write_record(record)
        return Recorder(folder.path, folder, record, config.track)
    except BaseException:
        folder.close()
        raise


def _refuse_other_settings(path: Path, config: TrainConfig) -> None:
    try:
        before = TrainConfig.stored(read_config(path / CONFIG))
    except UsageError as error:
        raise UsageError(f"{path / CONFIG}: {error}; use the version of dtrain that wrote it") from None
    was, asked, results = before.settings(), config.settings(), before.results().keys() | config.results().keys()
    differing = [name for name in {**was, **asked} if was.get(name) != asked.get(name) and name not in WHERE]
    if refused := [name for name in differing if name in results]:
        told = "; ".join(f"{name}: was {was.get(name)}, asked {asked.get(name)}" for name in refused[:3])
        told += f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        table = three_ways(
            (name, was.get(name), asked.get(name), "refused" if name in refused else asked.get(name))
            for name in differing
        )
        raise UsageError(f"{path} holds a run with other settings ({told}); give another --output", table=table)


def refuse_other_data(dataset: str, *, was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise DataError, with a table of what differs, unless the data set is the one that the run began with.

    was, asked: the facts of the data set in the checkpoint and now: class_names, channels, image_size, train_size, and
    the digest `data`.
    """
    if all(was.get(name) == value for name, value in asked.items()):
        return
    names = [set(facts["class_names"]) for facts in (was, asked)]
    alone = [", ".join([str(len(some)), *sorted(some - other)]) for some, other in (names, names[::-1])]
    differing = [name for name in asked if name != "class_names" and was.get(name) != asked[name]]
    figures = [(name, was.get(name), asked[name], "refused") for name in differing]
    raise DataError(
        f"{dataset} is not the data set that this run began with: an image, a label or a class has changed; bring it "
        "back, or train anew with another --output",
        table=three_ways([("classes", alone[0], alone[1], "refused"), *figures]),
    )
