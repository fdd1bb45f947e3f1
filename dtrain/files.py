"""Files and folders that appear whole or not at all, digests, and locks that death frees."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from dtrain.errors import StorageError

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"

PARTIAL = ".partial-"  # what an unfinished file or folder is called until it is renamed; never matches a real name


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits. Streams; O(size)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of: sorted keys, no spaces, UTF-8.

    Raises ValueError for a float that is not finite: JSON has no spelling for it.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def finite(value: Any) -> Any:
    """A JSON value with null in the place of every float that is not finite: what is written for people to plot."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut: fsync of the directory itself."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; on a clean exit it is fsynced and renamed to `path`, else removed.

    The old file stays until the new one is complete. OSError of the disk comes out as it is.
    """
    part = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; on a clean exit every file is fsynced and the folder renamed to `path`.

    `path` must not exist: a rename does not replace a folder that holds files. Removed if anything fails.
    """
    part = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        sync_folder(part)
        part.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value whole or not at all, indented for people; floats that are not finite become null."""
    with whole_file(path) as part:
        part.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def refuse_unknown_keys(file: Path | str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise StorageError for the first key that `file` holds and this version of dtrain does not know."""
    if unknown := sorted(set(given) - set(known)):
        raise StorageError(
            f"{file} holds {unknown[0]!r}, which this version of dtrain does not know; use the version that wrote it"
        )


def set_aside(path: Path, ending: str) -> Path:
    """Rename a file or folder to the first free of `<name>.<ending>`, `<name>.<ending>-2`, ...; returns the new path.

    For what must make way but may still be wanted: nothing is overwritten.
    """
    aside, number = path.with_name(f"{path.name}.{ending}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{ending}-{number}")
    path.rename(aside)
    return aside


def remove_partials(folder: Path) -> None:
    """Remove what a killed writer left in `folder`. Only for the owner of the folder's lock."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


class Lock:
    """One owner of a path at a time, by the kernel's advisory lock: freed when the process dies, however it dies.

    The file's text (host, process id) is for messages only; a restarted container may have the same of both.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def acquire(self) -> bool:
        """Take the lock; False if another process, or another Lock of this one, has it. Waits 0.2 s at most."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        # a refusal may come from no owner but from a passing `is_held`: microseconds, or a few of the kernel's slices
        deadline = time.monotonic() + 0.2
        while not _flock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                file.close()
                return False
            time.sleep(0.02)
        file.seek(0)
        file.truncate()
        file.write(f"{socket.gethostname()} process {os.getpid()}\n")
        file.flush()
        self._file = file
        return True

    def is_held(self) -> bool:
        """Whether somebody, in this process or another, has the lock now. Neither takes it nor makes the file."""
        try:
            with self.path.open(encoding="utf-8") as file:
                return not _flock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def owner(self) -> str:
        """Who wrote itself into the lock file, for the message of a refusal."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self.path.read_text(encoding="utf-8").strip() or "unknown"
        return "unknown"

    def release(self) -> None:
        """Give the lock back; the file stays, so that two waiters never lock two different files of one name."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _flock(file: TextIO, kind: int) -> bool:
    """Try to take the kernel's lock on an open file, until it is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
