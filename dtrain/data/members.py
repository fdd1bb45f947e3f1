"""Folders and tars: `train/CLASS/FILE` and `test/CLASS/FILE` (or `val/`; `test/` wins where both are there).

A tar is streamed, never extracted, in the order of its members; a folder is read in sorted order. One file is in memory
at a time, and of each only its label is kept. What is hidden or elsewhere is passed by, and so is a file whose ending
is of no picture (README.txt, Thumbs.db) if it is none; the latter is told.
"""

from __future__ import annotations

import functools
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from PIL import Image

from dtrain.config import Conversion
from dtrain.data.pictures import Decode, Source, Split, common_size, picture, quiet, size_of
from dtrain.errors import DataError

TAR_ENDINGS = (".tar", ".tar.gz", ".tar.xz")
PARTS = ("train", "val", "test")
HEAD = 1 << 20  # bytes by which a file with a strange ending is judged
Read = Callable[..., bytes]


def places_of(name: str, data_dir: Path) -> list[Path]:
    """Where pictures called `name` may lie: a folder or a tar in the data folder, or a path."""
    return [*(data_dir / (name + end) for end in ("", *TAR_ENDINGS)), Path(name)]


def is_place(path: Path) -> bool:
    """Whether there is a folder, or a file that is called a tar."""
    return path.is_dir() or (path.is_file() and path.name.endswith(TAR_ENDINGS))


@dataclass(frozen=True)
class Member:
    """One file below train/, val/ or test/. read(n): its first n bytes, all without n."""

    part: str
    class_name: str
    name: str
    is_picture: bool  # or taken for one: it may be damaged
    read: Read


def open_members(name: str, path: Path, digest: str, asked: Conversion) -> Source:
    """A folder or tar as a source. Lists all members; reads those whose names or sizes leave a doubt.

    Raises DataError for what cannot be a data set: no pictures, one class, a test class that train lacks, an empty
    class, a link in a tar.
    """
    listing = _Listing(path, sniff=asked.stored_size is None)
    held_out = "test" if listing.classes["test"] else "val"
    class_names = listing.class_names(held_out)
    size = asked.stored_size or listing.size
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    by_number = np.array([label_of.get(class_name, -1) for class_name in listing.numbers], dtype=np.int64)

    def stream(part: str) -> Iterator[Decode]:
        for member in members(path):
            if member.part == part and member.is_picture:
                yield partial(picture, str(path), member.name, member.read(), size, asked.resize)

    splits = {
        split: Split(by_number[listing.classes[part]], partial(stream, part))
        for split, part in (("train", "train"), ("test", held_out))
    }
    return Source(name, class_names, size, digest, splits, tuple(listing.passed_by))


class _Listing:
    """What a folder or tar holds. Of each picture a number is kept, that of its class in order of appearance."""

    def __init__(self, path: Path, *, sniff: bool) -> None:
        self.path = path
        self.classes: dict[str, list[int]] = {part: [] for part in PARTS}
        self.numbers: dict[str, int] = {}
        self.passed_by: list[str] = []
        pictures = self._pictures()
        with quiet():
            # heads are read until one rules out a size of their own: of photographs the first
            self.size = common_size(filter(None, (size_of(m.read()) for m in pictures))) if sniff else 0
            for _ in pictures:
                pass

    def _pictures(self) -> Iterator[Member]:
        for member in members(self.path):
            if member.is_picture:
                number = self.numbers.setdefault(member.class_name, len(self.numbers))
                self.classes[member.part].append(number)
                yield member
            else:
                self.passed_by.append(member.name)

    def class_names(self, held_out: str) -> tuple[str, ...]:
        """Sorted. Raises DataError where train/ and the part that is held out are no data set."""
        train, other = set(self.classes["train"]), set(self.classes[held_out])
        if not train or not other:
            found = ", ".join(f"{len(self.classes[part])} in {part}/" for part in PARTS)
            raise DataError(
                f"{self.path}: needs images in train/CLASS/ and in test/CLASS/ (or val/CLASS/); found {found}"
            )
        names = list(self.numbers)
        if len(train) < 2:
            raise DataError(f"{self.path}: train/ has the single class {names[min(train)]!r}; two or more are needed")
        if strange := sorted(names[number] for number in other - train):
            raise DataError(
                f"{self.path}: class {strange[0]!r} of {held_out}/ is not in train/; add, rename or remove it"
            )
        return tuple(sorted(names[number] for number in train))


@functools.cache
def _endings() -> frozenset[str]:
    """Of the files that Pillow reads, and none at all."""
    return frozenset({"", *(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)})


def members(path: Path) -> Iterator[Member]:
    """Every file below train/, val/ and test/ that is not hidden, in a fixed order. Raises DataError."""
    for parts, read in _tar_files(path) if path.is_file() else _folder_files(path):
        if parts[0] not in PARTS or any(part.startswith(".") for part in parts):
            continue
        name = shown("/".join(parts))
        is_picture = PurePosixPath(name).suffix.lower() in _endings() or size_of(read(HEAD)) is not None
        if is_picture and len(parts) != 3:
            raise DataError(f"{path}: {name} is not {parts[0]}/CLASS/FILE; move or remove it")
        yield Member(parts[0], shown(parts[1]), name, is_picture, read)


def shown(name: str) -> str:
    """A file's name as text on one line: bytes that are not UTF-8 and characters that do not print are spelled out."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


# --- folders


def stats_of(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size in bytes and time of change in ns of every file that `members` reads, sorted."""
    for parts, path in _walk(folder):
        stat = path.stat()
        yield shown("/".join(parts)), stat.st_size, stat.st_mtime_ns


def _walk(folder: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The files below train/, val/ and test/ that are not hidden; links are followed, here as in torchvision."""
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root).relative_to(folder).parts
        folders[:] = sorted(name for name in folders if (here or name in PARTS) and not name.startswith("."))
        names = sorted(name for name in names if here and not name.startswith("."))
        if here and not folders and not names:
            raise DataError(f"{shown(root)}: an empty folder; fill or remove it")
        for name in names:
            path = Path(root, name)
            if not path.is_file():  # reading a pipe would wait for ever
                raise DataError(f"{shown(str(path))}: neither a file nor a folder (a broken link, a device); remove it")
            yield (*here, name), path


def _folder_files(folder: Path) -> Iterator[tuple[tuple[str, ...], Read]]:
    return ((parts, partial(_read_file, path)) for parts, path in _walk(folder))


def _read_file(path: Path, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"{shown(str(path))}: cannot be read ({error.strerror}); mend or remove it") from error


# --- tars


class _Header(tarfile.TarInfo):
    """tarfile takes any header that is cut off or damaged, but the first, for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):  # the end, as it should be
                raise
            raise tarfile.ReadError(str(error)) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).split(":")[0].split("\n")[0]
        raise DataError(
            f"{path}: cannot be read as a tar ({reason}); it is cut short, damaged or something else"
        ) from error


def _tar_files(path: Path) -> Iterator[tuple[tuple[str, ...], Read]]:
    def read(info: tarfile.TarInfo, count: int = -1) -> bytes:
        with _readable(path):
            file = tar.extractfile(info)
            return b"" if file is None else file.read(count)

    named: set[tuple[str, ...]] = set()  # folders of classes
    filled: set[tuple[str, ...]] = set()
    with _readable(path), tarfile.open(path, tarinfo=_Header) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte a file
            parts = PurePosixPath(info.name).parts
            if info.isdir():
                if len(parts) == 2 and parts[0] in PARTS and not parts[1].startswith("."):
                    named.add(parts)
                continue
            if not info.isreg() or info.name.startswith("/") or ".." in parts:
                raise DataError(f"{path}: {info.name!r} is a link, a device or leads outside; pack plain files only")
            if len(parts) > 2 and parts[0] in PARTS and not any(part.startswith(".") for part in parts):
                filled.add(parts[:2])
            yield parts, partial(read, info)
    if empty := sorted(named - filled):
        raise DataError(f"{path}: {shown('/'.join(empty[0]))}/ is an empty folder; fill or remove it")
