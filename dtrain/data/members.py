"""Folders and tars as sources: `train/CLASS/FILE` and `test/CLASS/FILE`, or `val/` in the place of `test/`.

If there are both, `test/` is used. A tar is streamed in the order of its members and never extracted; a folder is read
in sorted order. One file at a time is in memory, and only its label is kept. Hidden files and files elsewhere are
ignored. A file whose ending is not that of a picture (README.txt, Thumbs.db) is ignored too, unless it is a picture
after all; such files are listed for the user.
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

from dtrain.data.pictures import Decode, Source, Split, common_size, picture, quiet, size_of
from dtrain.errors import DataError
from dtrain.settings.data import Conversion

TAR_ENDINGS = (".tar", ".tar.gz", ".tar.xz")
PARTS = ("train", "val", "test")
HEAD = 1 << 20  # bytes that are read of a file with an unknown ending, to see whether it is a picture
Read = Callable[..., bytes]


def places_of(name: str, data_dir: Path) -> list[Path]:
    """Where a data set called `name` may lie: a folder or a tar in the data folder, or `name` as a path."""
    return [*(data_dir / (name + end) for end in ("", *TAR_ENDINGS)), Path(name)]


def is_place(path: Path) -> bool:
    """Whether `path` is a folder, or a file with the ending of a tar."""
    return path.is_dir() or (path.is_file() and path.name.endswith(TAR_ENDINGS))


@dataclass(frozen=True)
class Member:
    """One file below train/, val/ or test/. read(n): its first n bytes; read(): all of it."""

    part: str
    class_name: str
    name: str
    is_picture: bool  # by its ending or its content; it may still be damaged
    read: Read


def open_members(name: str, path: Path, digest: str, asked: Conversion) -> Source:
    """A folder or tar as a source. Lists all members, and reads pictures as far as needed to find their common size.

    asked: if it names a size, no picture is read. Raises DataError for what cannot be a data set: no pictures, a single
    class, a class in test/ that train/ lacks, an empty class, a link in a tar.
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
    """What a folder or tar holds. Classes are numbered as they appear; for each picture only its class is kept."""

    def __init__(self, path: Path, *, sniff: bool) -> None:
        self.path = path
        self.classes: dict[str, list[int]] = {part: [] for part in PARTS}
        self.numbers: dict[str, int] = {}
        self.passed_by: list[str] = []
        pictures = self._pictures()
        with quiet():
            # pictures are read until one is not a square of the same size; photographs mostly end this with the first
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
        """The class names, sorted. Raises DataError if train/ and the `held_out` part do not form a data set."""
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
    """The endings of the files that Pillow can read, and "" for no ending at all."""
    return frozenset({"", *(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN)})


def members(path: Path) -> Iterator[Member]:
    """Every file below train/, val/ and test/ that is not hidden, in a fixed order.

    Raises DataError for a picture that does not lie in a class, and for a folder or tar that cannot be read.
    """
    for parts, read in _tar_files(path) if path.is_file() else _folder_files(path):
        if parts[0] not in PARTS or any(part.startswith(".") for part in parts):
            continue
        name = shown("/".join(parts))
        is_picture = PurePosixPath(name).suffix.lower() in _endings() or size_of(read(HEAD)) is not None
        if is_picture and len(parts) != 3:
            raise DataError(f"{path}: {name} is not {parts[0]}/CLASS/FILE; move or remove it")
        yield Member(parts[0], shown(parts[1]), name, is_picture, read)


def shown(name: str) -> str:
    """The name of a file as text on one line, with escapes for bytes that are not UTF-8 and for control characters."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


# --- folders


def stats_of(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size in bytes and modification time in ns of every file that `members` reads, sorted."""
    for parts, path in _walk(folder):
        stat = path.stat()
        yield shown("/".join(parts)), stat.st_size, stat.st_mtime_ns


def _walk(folder: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The files below train/, val/ and test/ that are not hidden. Links are followed, as in torchvision."""
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root).relative_to(folder).parts
        folders[:] = sorted(name for name in folders if (here or name in PARTS) and not name.startswith("."))
        names = sorted(name for name in names if here and not name.startswith("."))
        if here and not folders and not names:
            raise DataError(f"{shown(root)}: an empty folder; fill or remove it")
        for name in names:
            path = Path(root, name)
            if not path.is_file():  # a read from a pipe would never end
                raise DataError(f"{shown(str(path))}: neither a file nor a folder (a broken link, a device); remove it")
            yield (*here, name), path


def _folder_files(folder: Path) -> Iterator[tuple[tuple[str, ...], Read]]:
    return ((parts, partial(_read_file, path)) for parts, path in _walk(folder))


def _read_file(path: Path, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise DataError(f"{shown(str(path))}: cannot be read ({error.strerror}); repair or remove it") from error


# --- tars


class _Header(tarfile.TarInfo):
    """A tar header that raises ReadError if it is damaged; tarfile alone would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):  # a block of zeros is the proper end
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

    named: set[tuple[str, ...]] = set()  # the class folders that the tar lists
    filled: set[tuple[str, ...]] = set()  # the class folders that hold files
    with _readable(path), tarfile.open(path, tarinfo=_Header) as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps a kilobyte for each file
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
