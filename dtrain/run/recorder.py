"""What a run leaves, as the loop sees it: a Recorder on every process, which writes on rank 0 and nowhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain import plugins
from dtrain.config import TrainConfig, read_config
from dtrain.errors import DataError, DtrainError, StorageError, UsageError
from dtrain.run.console import Console, three_ways
from dtrain.run.rundir import (
    CONFIG,
    Record,
    Row,
    RunDir,
    check_writable,
    environment,
    open_run,
    read_record,
    read_rows,
    versions,
)
from dtrain.run.tracking import Tracking

WHERE = ("output", "name", "resume", "recipe")  # how the run was found, and no part of it
HELD_ROWS = 10_000  # some megabytes: rows that wait for a disk with room


class Recorder:
    """The run directory, its record, and who follows it. Without a directory (every rank but 0) no method does a thing.

    A row that the disk refuses is held, and written, in order, with the next that it takes; `flush` insists.
    track: names of trackers, checked.
    """

    def __init__(self, path: Path, folder: RunDir | None, record: Record, track: Sequence[str] = ()) -> None:
        self.path = path
        self.folder = folder
        self.record = record
        self._tracking = Tracking(path, track)
        self._held: list[Row] = []

    def update(self, **changed: Any) -> None:
        """Change run.json."""
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
        """Write what is held and make all rows survive a power cut: due before a checkpoint. Raises StorageError."""
        if self.folder is not None:
            self._write_held()
            self.folder.sync()

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Add an event row: start, resume, save, stop, finish."""
        self.row({"kind": "event", "event": name, "step": step, **facts, "clock": {"time": time.time()}})

    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        return read_rows(self.path) if self.folder is not None else []

    def failed(self, error: Exception) -> None:
        """Say in run.json how the run ended. Never raises StorageError: the error itself matters more."""
        code = error.exit_code if isinstance(error, DtrainError) else 1
        with contextlib.suppress(StorageError):
            self.update(status="failed", exit_code=code, reason=f"{type(error).__name__}: {error}")

    def close(self, console: Console) -> None:
        """Let others have the directory, when those who follow the run have had their few seconds."""
        for line, fell_short in self._tracking.close():
            (console.warn if fell_short else console.line)(line)
        if self.folder is not None:
            self.folder.close()


def path_of(config: TrainConfig) -> Path:
    """The run directory that `config` means, as far as settings decide; `--resume none` may take the next free one."""
    if config.resume not in ("auto", "none"):
        given = Path(config.resume)
        return given.parent.parent if given.parent.name == "checkpoints" else given
    return config.output or Path("runs") / config.run_name()


def resolved_before(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """What `auto` became when this run began, for a resume to keep; empty for a new run.

    Threads are kept for an equal number of processes only: another number divides the cores anew. Raises StorageError
    if the directory could not be written, before any work is done for it.
    """
    path, fresh = path_of(config), config.resume == "none"
    check_writable(path.parent if fresh and path.exists() else path)  # a taken one is left alone
    record = None if fresh else read_record(path)
    if record is None:
        return {}
    kept = {"amp_dtype": record.resolved.get("amp_dtype")}
    if record.resolved.get("world_size") == world_size:
        kept["threads"] = record.resolved.get("threads")
    return kept


def open_recorder(config: TrainConfig, *, main: bool, command: Sequence[str], resolved: Mapping[str, Any]) -> Recorder:
    """Own the run directory (`main`), refuse one with other settings, and write config.toml and run.json.

    resolved: what `auto` became.
    Raises UsageError for a directory that is in use, is another run's, or is not there to resume; StorageError.
    """
    path = path_of(config)
    if not main:
        return Recorder(path, None, Record("running"))
    if config.resume not in ("auto", "none") and read_record(path) is None:
        raise UsageError(f"--resume {config.resume}: no run is there; give a run directory, auto or none")
    folder = open_run(path, path.parent, path.name, fresh=config.resume == "none")
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
    before = TrainConfig.stored(read_config(path / CONFIG))
    was, asked, results = before.settings(), config.settings(), before.results().keys() | config.results().keys()
    differing = [name for name in {**was, **asked} if was.get(name) != asked.get(name) and name not in WHERE]
    if refused := [name for name in differing if name in results]:
        told = "; ".join(f"{name}: was {was.get(name)}, asked {asked.get(name)}" for name in refused[:3])
        told += f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        error = UsageError(f"{path} holds a run with other settings ({told}); give another --output")
        error.table = three_ways(
            (name, was.get(name), asked.get(name), "refused" if name in refused else asked.get(name))
            for name in differing
        )
        raise error


def refuse_other_data(dataset: str, *, was: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise DataError, with a table, unless the data set is the one that the run began with.

    was, asked: class_names, channels, image_size, train_size and digest (`data`), of the checkpoint and of now.
    """
    if all(was.get(name) == value for name, value in asked.items()):
        return
    error = DataError(
        f"{dataset} is not the data set that this run began with: an image, a label or a class has changed; bring it "
        "back, or train anew with another --output"
    )
    names = [set(facts["class_names"]) for facts in (was, asked)]
    alone = [", ".join([str(len(some)), *sorted(some - other)]) for some, other in (names, names[::-1])]
    differing = [name for name in asked if name != "class_names" and was.get(name) != asked[name]]
    figures = [(name, was.get(name), asked[name], "refused") for name in differing]
    error.table = three_ways([("classes", alone[0], alone[1], "refused"), *figures])
    raise error
