"""The run directory: everything that a run leaves, one owner at a time.

    runs/allcnn_c-digits-1a2b3c4d/
      config.toml     the settings; `dtrain train --config config.toml` runs again as is
      run.json        the record: how far, how it ended, with what it was computed
      metrics.jsonl   one row a line: train, eval, event
      checkpoints/    see checkpoint.py
      trackers/       how far each has followed, and what it said
      lock            held by the owner as long as it lives

A row is a flat JSON object with `kind`, `step` and figures named with their units; what the clock said stands under
the one key `clock`, so that two runs can be compared without it.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w

from dtrain.config import CHECKPOINTS
from dtrain.errors import StorageError, UsageError
from dtrain.files import Lock, finite, whole_file, write_json

Row = Mapping[str, Any]
Status = Literal["running", "finished", "stopped", "failed"]

CONFIG, RECORD, METRICS, LOCK = "config.toml", "run.json", "metrics.jsonl", "lock"
ELSEWHERE = "give another directory with --output"
EVALUATION = ("hits", "images", "split", "weights")  # of an eval row, as `summaries` repeats them
DISTRIBUTIONS = ("dtrain", "torch", "numpy", "numba", "safetensors", "ffcv")  # what the numbers of a run come from


@dataclass(frozen=True)
class Record:
    """What run.json holds. `resolved`: what `auto` became; `plugins`: kind to what was used."""

    status: Status
    step: int = 0
    exit_code: int | None = None  # of dtrain itself: torchrun turns every failure into 1
    reason: str | None = None
    last_checkpoint: str | None = None  # the folder's name
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)


class RunDir:
    """A run directory that this process owns until the end of a `with`, or `close`, or its death. Made by `open_run`.

    Every method raises StorageError, naming the file and the reason, if the disk refuses.
    """

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._lock = lock

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Write config.toml, whole or not at all. settings: TOML's own types, without None."""
        text = f"# dtrain train --config {CONFIG}\n" + tomli_w.dumps(settings)
        with _told(self.path / CONFIG), whole_file(self.path / CONFIG) as part:
            part.write_text(text, encoding="utf-8")

    def write_record(self, record: Record) -> None:
        """Write run.json, whole or not at all."""
        with _told(self.path / RECORD):
            write_json(self.path / RECORD, dataclasses.asdict(record))

    def append(self, row: Row) -> None:
        """Add a row to metrics.jsonl, a whole line or nothing. It survives a kill at once, a power cut after `sync`."""
        line = _line(row)
        with _told(self.path / METRICS), (self.path / METRICS).open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                file.truncate(end)  # else the next row would be glued to half of this one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Make the rows so far survive a power cut; due before a checkpoint, which must not know more than they do."""
        with _told(self.path / METRICS), (self.path / METRICS).open("ab") as file:
            os.fsync(file.fileno())

    def cut_back(self, step: int, *, evaluated: bool = True) -> None:
        """Drop the train and eval rows after `step`, which will be computed again, and a torn last line.

        evaluated: whether the evaluation of `step` itself stands; where it is still due, its rows are dropped as well.
        Call it before the first `append` of a run that goes on, also where it goes on at step 0. Events stay: they
        tell what happened. Whole or not at all.
        """
        last = {"train": step, "eval": step if evaluated else step - 1}
        kept = [row for row in read_rows(self.path) if row["kind"] == "event" or row["step"] <= last[row["kind"]]]
        with _told(self.path / METRICS), whole_file(self.path / METRICS) as part:
            part.write_bytes(b"".join(map(_line, kept)))

    def close(self) -> None:
        """Let others have the directory."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(output: Path | None, runs: Path, name: str, *, fresh: bool) -> RunDir:
    """Own the run directory `output`, or `runs/name` where that is None; it is made if it is not there.

    fresh: take the first directory of `<it>`, `<it>-2`, `<it>-3`, ... that holds nothing.
    Raises UsageError if another process owns it, StorageError if it cannot be written.
    """
    base = runs / name if output is None else output.absolute()
    path, number = base, 1
    with _told(base, ELSEWHERE):
        while True:
            taken = fresh and path.is_dir() and any(path.iterdir())
            lock = Lock(path / LOCK)
            if not taken and lock.acquire():
                return RunDir(path, lock)
            if not fresh:
                raise UsageError(
                    f"run directory {path} is in use by {lock.owner()}; stop that run, or give another --output, "
                    "or --resume none for a new run"
                )
            number += 1
            path = base.with_name(f"{base.name}-{number}")


def check_writable(path: Path) -> None:
    """Raise StorageError if no folder can be made at `path`, as far as that is seen without making it."""
    with _told(path, ELSEWHERE):
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _told(path: Path, advice: str = "free some space, or see who may write there") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; {advice}") from error


def _line(row: Row) -> bytes:
    return json.dumps(finite(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"


# -- what anyone may read --------------------------------------------------------------------------------------------


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run directory's metrics.jsonl; without a torn end, as a power cut leaves it. No file: no rows.

    Raises StorageError for a line in the middle that is not a row.
    """
    path = run / METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    rows = [parsed(line) for line in lines[:-1]]  # what follows the last line end is nothing, or torn
    while rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise StorageError(f"line {rows.index(None) + 1} of {path} is not a row; mend or remove it")
    return [row for row in rows if row is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The row in a line of metrics.jsonl; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and type(row.get("step")) is int and row.get("kind") in ("train", "eval", "event")
    return row if sound else None


def comparable(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What two equal runs have in common: train and eval rows without `clock`."""
    return [{k: v for k, v in row.items() if k != "clock"} for row in rows if row["kind"] in ("train", "eval")]


def read_record(run: Path) -> Record | None:
    """The record of a run directory; None where there is no run.json. Raises StorageError if it is damaged."""
    path = run / RECORD
    try:
        known = {f.name for f in dataclasses.fields(Record)}  # other versions may write more
        record = Record(**{name: value for name, value in json.loads(path.read_bytes()).items() if name in known})
        if record.status not in get_args(Status) or type(record.step) is not int:
            raise ValueError(record.status)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise StorageError(f"{path} is not the record of a run; remove it") from None
    return record


def environment() -> dict[str, str]:
    """The Python, platform and processor of this process, for the record."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The installed versions of the distributions that shape the numbers of a run. Imports none of them."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summaries(runs: Path) -> list[dict[str, Any]]:
    """One row a run directory under `runs`, by name: what `dtrain runs` shows.

    Keys: run, status, step, reason, and of the last evaluation hits, images, split, weights (None before the first).
    A run that says "running" while nobody holds its lock has "died"; one that cannot be read is "damaged", and the
    reason says why.
    """
    if not runs.is_dir():
        return []
    return [_summary(path) for path in sorted(runs.iterdir()) if (path / RECORD).exists() or (path / LOCK).exists()]


def _summary(run: Path) -> dict[str, Any]:
    alive = Lock(run / LOCK).is_held()  # before the record is read: a run that ends in between is then no "died"
    summary: dict[str, Any] = {"run": run.name, "status": "damaged", "step": None, "reason": None}
    summary |= dict.fromkeys(EVALUATION)
    try:
        record = read_record(run) or Record("running")
        evaluations = [row for row in read_rows(run) if row["kind"] == "eval"]
    except StorageError as error:
        return {**summary, "reason": str(error)}
    status = "died" if record.status == "running" and not alive else record.status
    last = evaluations[-1] if evaluations else {}
    figures = {name: last.get(name) for name in EVALUATION}
    return {**summary, "status": status, "step": record.step, "reason": record.reason, **figures}
