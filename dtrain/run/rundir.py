"""The run directory: everything that a run writes. One process at a time owns it.

runs/allcnn_c-digits-1a2b3c4d/
  config.toml     the settings; `dtrain train --config config.toml` trains with the same ones again
  run.json        the record: how far the run came, how it ended, its environment and versions
  metrics.jsonl   one row a line, see rows.py
  checkpoints/    see checkpoint.py
  trackers/       for each tracker its log, its files and how far it has come
  lock            a lock file, held by the process that owns the run as long as it lives
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w

from dtrain.errors import StorageError, UsageError
from dtrain.files import Lock, refuse_unknown_keys, whole_file, write_json
from dtrain.run.rows import EvalRow, EventRow, Row, TrainRow, as_line, parsed
from dtrain.settings.layers import CHECKPOINTS

Status = Literal["running", "finished", "stopped", "failed"]

CONFIG, RECORD, METRICS, LOCK = "config.toml", "run.json", "metrics.jsonl", "lock"
ELSEWHERE = "give another directory with --output"
EVALUATION = ("hits", "images", "split", "weights")  # of an eval row, as `summaries` repeats them
DISTRIBUTIONS = ("dtrain", "torch", "numpy", "numba", "safetensors", "ffcv")  # whose versions may affect the results


@dataclass(frozen=True)
class Record:
    """The content of run.json.

    resolved: the values that settings given as `auto` took. plugins: the plugin of each kind that was used.
    """

    status: Status
    step: int = 0
    exit_code: int | None = None  # of dtrain itself, because torchrun turns every failure into 1
    reason: str | None = None
    last_checkpoint: str | None = None  # the folder's name
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    plugins: Mapping[str, str] = field(default_factory=dict)


class RunDir:
    """A run directory that this process owns until `close`, the end of a `with` block, or its own end. See `open_run`.

    Every method that writes raises StorageError, with the file and the reason, if it cannot.
    """

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self._lock = lock

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Write config.toml, completely or not at all. settings: values in TOML's types, without None."""
        text = f"# dtrain train --config {CONFIG}\n" + tomli_w.dumps(settings)
        with _told(self.path / CONFIG), whole_file(self.path / CONFIG) as part:
            part.write_text(text, encoding="utf-8")

    def write_record(self, record: Record) -> None:
        """Write run.json, completely or not at all."""
        with _told(self.path / RECORD):
            write_json(self.path / RECORD, dataclasses.asdict(record))

    def append(self, row: Row) -> None:
        """Add a row to metrics.jsonl, completely or not at all.

        It then survives the end of this process, and after `sync` also a power failure.
        """
        line = as_line(row)
        with _told(self.path / METRICS), (self.path / METRICS).open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) != len(line):
                file.truncate(end)  # otherwise the next row would follow half of this one on one line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk. Call it before each checkpoint, which must not be newer than the rows."""
        with _told(self.path / METRICS), (self.path / METRICS).open("ab") as file:
            os.fsync(file.fileno())

    def cut_back(self, step: int, *, evaluated: bool = True) -> None:
        """Remove the train and eval rows after `step`, which will be computed again, and an incomplete last line.

        evaluated: whether `step` itself has been evaluated; if that is still due, eval rows of `step` are removed too.
        Event rows stay, since they tell what happened, and so do rows of a kind that this version does not know.
        Call it before the first `append` of a resumed run, even if that begins at step 0. The file is changed
        completely or not at all.
        """
        last = {TrainRow: step, EvalRow: step if evaluated else step - 1}
        kept = [
            line + b"\n"
            for line, row in _lines(self.path)
            if row is None or isinstance(row, EventRow) or row.step <= last[type(row)]
        ]
        with _told(self.path / METRICS), whole_file(self.path / METRICS) as part:
            part.write_bytes(b"".join(kept))

    def close(self) -> None:
        """Release the directory."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(base: Path, *, fresh: bool) -> RunDir:
    """Become the owner of the run directory `base`, which is created if it does not exist.

    fresh: use the first of `<base>`, `<base>-2`, `<base>-3`, ... that does not exist or is empty.
    Raises UsageError if another process owns it, StorageError if it cannot be written.
    """
    base = base.absolute()
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
    """Raise StorageError if no folder can be created at `path`, as far as can be seen without creating it."""
    with _told(path, ELSEWHERE):
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _told(path: Path, advice: str = "free some space, or check the permissions") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; {advice}") from error


# -- what anyone may read --------------------------------------------------------------------------------------------


def read_rows(run: Path) -> list[Row]:
    """The rows of a run directory's metrics.jsonl; an empty list if there is no such file.

    Incomplete lines at the end, as a power failure leaves them, are ignored, and so are rows of a kind that this
    version does not know. Raises StorageError for a line before the last row that is not a row.
    """
    return [row for _, row in _lines(run) if row is not None]


def _lines(run: Path) -> list[tuple[bytes, Row | None]]:
    """Each complete line of metrics.jsonl, without its line end, and the row in it (None for an unknown kind)."""
    path = run / METRICS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # after the last line end comes nothing, or an incomplete line
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    found: list[tuple[bytes, Row | None]] = []
    damaged = None
    for number, line in enumerate(lines, start=1):
        try:
            row = parsed(line)
        except ValueError:
            damaged = damaged or number
            continue
        if damaged is not None:  # not an incomplete end of the file, since a row follows
            raise StorageError(f"line {damaged} of {path} is not a row; repair or remove it")
        found.append((line, row))
    return found


def read_record(run: Path) -> Record | None:
    """The record of a run directory; None if there is no run.json.

    Raises StorageError if it is damaged, or if a newer version of dtrain has written it.
    """
    path = run / RECORD
    try:
        values = json.loads(path.read_bytes())
        refuse_unknown_keys(path, values.keys(), (f.name for f in dataclasses.fields(Record)))
        record = Record(**values)
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
    """The installed versions of DISTRIBUTIONS, which may affect the results of a run. Imports none of them."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summaries(runs: Path) -> list[dict[str, Any]]:
    """The rows of `dtrain runs`: a dictionary for each run directory under `runs`, sorted by name.

    Keys: run, status, step, reason; and from the last evaluation: hits, images, split, weights (None if there is none).
    The status is "died" if the record says "running" but no process holds the lock, and "damaged" if the run cannot be
    read; the reason then says why.
    """
    if not runs.is_dir():
        return []
    return [_summary(path) for path in sorted(runs.iterdir()) if (path / RECORD).exists() or (path / LOCK).exists()]


def _summary(run: Path) -> dict[str, Any]:
    # before the record is read: a run that ends between the two would otherwise be shown as died
    alive = Lock(run / LOCK).is_held()
    summary: dict[str, Any] = {"run": run.name, "status": "damaged", "step": None, "reason": None}
    summary |= dict.fromkeys(EVALUATION)
    try:
        record = read_record(run) or Record("running")
        evaluations = [row for row in read_rows(run) if isinstance(row, EvalRow)]
    except StorageError as error:
        return {**summary, "reason": str(error)}
    status = "died" if record.status == "running" and not alive else record.status
    figures = {name: getattr(evaluations[-1], name) if evaluations else None for name in EVALUATION}
    return {**summary, "status": status, "step": record.step, "reason": record.reason, **figures}
