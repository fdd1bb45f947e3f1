"""Atomic writes of files and folders, digests, and locks that the kernel frees when their owner dies."""

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

PARTIAL = ".partial-"  # begins the name of an unfinished file or folder; no finished one has such a name


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits. Reads the file once, in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """A JSON value as bytes to take a digest of; equal values give equal bytes: sorted keys, no spaces, UTF-8.

    Raises ValueError for a float that is not finite: JSON has no spelling for it.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def finite(value: Any) -> Any:
    """A copy of a JSON value with None (null in JSON) in place of every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Call fsync on a folder, so that files created or renamed in it are still there after a power failure."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write the file `path` atomically: yields a temporary path in the same folder, to be written inside the `with`.

    If the block succeeds, the temporary file is fsynced and renamed to `path`; otherwise it is removed. An old file
    stays until the new one is complete. An OSError is passed on unchanged.
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
    """Make the folder `path` atomically: yields a temporary folder beside it, to be filled inside the `with`.

    If the block succeeds, every file in the folder is fsynced and the folder is renamed to `path`; otherwise it is
    removed. It must have no subfolders. `path` must not exist, since a rename cannot replace a folder that holds files.
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
    """Write a JSON value to a file atomically, indented for people; floats that are not finite become null."""
    with whole_file(path) as part:
        part.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def refuse_unknown_keys(file: Path | str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise StorageError if `file` holds a key that this version of dtrain does not know; names the first one."""
    if unknown := sorted(set(given) - set(known)):
        raise StorageError(
            f"{file} holds {unknown[0]!r}, which this version of dtrain does not know; use the version that wrote it"
        )


def set_aside(path: Path, ending: str) -> Path:
    """Rename a file or folder to the first free of `<name>.<ending>`, `<name>.<ending>-2`, ...; returns the new path.

    For files that must make way but may still be wanted. Nothing is overwritten.
    """
    aside, number = path.with_name(f"{path.name}.{ending}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{ending}-{number}")
    path.rename(aside)
    return aside


def remove_partials(folder: Path) -> None:
    """Remove the unfinished files that a killed process left in `folder`. Only the owner of its lock may call this."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


class Lock:
    """A lock file with at most one owner, by flock: the kernel frees it when the owner dies, however it dies.

    The text in the file (host, process id) is for messages only: a restarted container may have the same host name and
    process id as the one before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def acquire(self) -> bool:
        """Take the lock; returns False if another process, or another Lock object, has it. Waits 0.2 s at most."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        # `is_held` in another process takes a shared lock for a moment, which must not be mistaken for an owner
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
        """Whether somebody, in this process or another, has the lock now. Does not create the file."""
        try:
            with self.path.open(encoding="utf-8") as file:
                return not _flock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def owner(self) -> str:
        """The host and process id in the lock file, for an error message; "unknown" if it cannot be read."""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self.path.read_text(encoding="utf-8").strip() or "unknown"
        return "unknown"

    def release(self) -> None:
        """Free the lock. The file stays: if it were removed, two processes could lock two files of the same name."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _flock(file: TextIO, kind: int) -> bool:
    """Try to lock an open file without waiting; whether it worked. The lock lasts until the file is closed."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
