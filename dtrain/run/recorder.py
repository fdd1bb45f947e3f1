"""The Recorder, through which the training loop writes to the run directory. Each process has one; rank 0's writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain import plugins
from dtrain.errors import DataError, StorageError, UsageError, exit_code_of
from dtrain.run import checkpoint
from dtrain.run.console import Console, three_ways
from dtrain.run.rows import EventClock, EventRow, Row
from dtrain.run.rundir import (
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

HELD_ROWS = 10_000  # the most rows (some megabytes) that are kept in memory while the disk is full


class Recorder:
    """The run directory, its record and its trackers. If `folder` is None, as on every rank but 0, it does nothing.

    A row that cannot be written, because the disk is full, is kept in memory and written before the next row; only
    `flush` raises at once. track: names of trackers, which must have been checked by `trackers.find`.
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
        """Add a row to metrics.jsonl. Raises StorageError if more than HELD_ROWS cannot be written."""
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
        """Write the rows kept in memory and flush metrics.jsonl to the disk. Call it before each checkpoint.

        Raises StorageError.
        """
        if self.folder is not None:
            self._write_held()
            self.folder.sync()

    def save(
        self,
        step: int,
        parts: Mapping[str, checkpoint.Tensors],
        counts: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        keep: int,
        best: int | None,
    ) -> str | None:
        """Write the checkpoint of `step`, and remove the old ones but the best and `keep` others.

        Returns a line of warning where that went wrong after the checkpoint was written, else None. Raises what
        `checkpoint.save` raises.
        """
        if self.folder is None:
            return None
        self.flush()
        path = checkpoint.save(self.folder.checkpoints, step, parts, counts, about)
        self.event("save", step)
        try:
            checkpoint.prune(self.folder.checkpoints, keep=keep, best=best)
            self.update(step=step, last_checkpoint=path.name)
        except StorageError as error:
            return f"saved, but: {error}"
        return None

    def newest(self, resume: str) -> checkpoint.Found:
        """The checkpoint to go on from: the newest that is sound, or the one whose path `--resume` gives.

        Newer ones than that are set aside, and so are damaged ones, which are told. None for `--resume none`.
        """
        if self.folder is None or resume == "none":
            return checkpoint.Found(None, [])
        asked = Path(resume)
        if asked.parent.name == checkpoint.FOLDER:
            checkpoint.undo_after(asked)
        return checkpoint.newest(self.folder.checkpoints)

    def cut_back(self, step: int, *, evaluated: bool) -> None:
        """Drop the rows after `step`, which will be computed again; see `RunDir.cut_back`."""
        if self.folder is not None:
            self.folder.cut_back(step, evaluated=evaluated)

    def event(self, name: str, step: int, *, processes: int | None = None, reason: str | None = None) -> None:
        """Add an event row. name: start or resume (give `processes`), save, stop (give `reason`), or finish."""
        self.row(EventRow(name, step, processes, reason, clock=EventClock(time.time())))

    def rows(self) -> list[Row]:
        """The rows written so far."""
        return read_rows(self.path) if self.folder is not None else []

    def failed(self, error: Exception) -> None:
        """Write into run.json that the run failed with `error`. Raises no StorageError, since `error` matters more."""
        with contextlib.suppress(StorageError):
            self.update(status="failed", exit_code=exit_code_of(error), reason=f"{type(error).__name__}: {error}")

    def close(self, console: Console) -> None:
        """Give the trackers a few seconds to end, print how each ended, and release the directory."""
        for line, fell_short in self._tracking.close():
            (console.warn if fell_short else console.line)(line)
        if self.folder is not None:
            self.folder.close()


def resolved_before(path: Path, *, fresh: bool, world_size: int) -> dict[str, Any]:
    """The values that settings given as `auto` took when the run at `path` began, which a resume has to keep.

    Empty for a new run. fresh: whether the run is new in any case, as with `--resume none`. The number of threads is
    kept only if the number of processes is the same, since it depends on that. Raises StorageError if the directory
    cannot be written, so that this is known before any long work begins.
    """
    check_writable(path.parent if fresh and path.exists() else path)  # a fresh run gets another directory beside it
    record = None if fresh else read_record(path)
    if record is None:
        return {}
    kept = {"amp_dtype": record.resolved.get("amp_dtype")}
    if record.resolved.get("world_size") == world_size:
        kept["threads"] = record.resolved.get("threads")
    return kept


def recorder_elsewhere(path: Path) -> Recorder:
    """The recorder of a process that is not the main one: it writes nothing."""
    return Recorder(path, None, Record("running"))


def open_recorder(
    path: Path,
    settings: Mapping[str, Any],
    *,
    resume: str,
    refuse: Callable[[Path], None],
    command: Sequence[str],
    resolved: Mapping[str, Any],
    chosen: Sequence[tuple[plugins.Kind, str]],
    track: Sequence[str],
) -> Recorder:
    """Lock the run directory `path` and write its config.toml and run.json. Only for the main process.

    settings: for config.toml. refuse: called with the directory if there is a run in it; raises if that run has other
    settings. resolved: the values that settings given as `auto` took. chosen: kind and name of each plugin in use.
    Raises UsageError for a directory that is in use or is to be resumed and does not exist; StorageError if it cannot
    be read or written.
    """
    if resume not in ("auto", "none") and read_record(path) is None:
        raise UsageError(f"--resume {resume}: no run is there; give a run directory, auto or none")
    folder = open_run(path, fresh=resume == "none")
    try:
        before = read_record(folder.path)
        if before is not None and before.last_checkpoint is not None:  # else nothing of it was ever saved
            refuse(folder.path)
        folder.write_config(settings)
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
        return Recorder(folder.path, folder, record, track)
    except BaseException:
        folder.close()
        raise


def refuse_other_data(dataset: str, *, was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise DataError, with a table of the differences, unless the data set is the one that the run began with.

    was, asked: the facts about the data set in the checkpoint, and now (`DataSet.facts`): class_names, channels,
    image_size, train_size, and the digest `data`.
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
