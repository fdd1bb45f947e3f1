"""Where images come from: `--dataset` as a name, a folder, a tar or a pair of betons -> Source.

The table below is all there is by name; a folder or tar needs no code. What each kind is made of: `named`, `members`,
`pairs`; how a picture becomes bytes: `pictures`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dtrain.config import Conversion
from dtrain.data import named
from dtrain.data.members import TAR_ENDINGS, open_members, stats_of
from dtrain.data.named import Layout
from dtrain.data.pairs import open_pair, pair_in
from dtrain.data.pictures import Decode, Pixels, Source, Split, from_array
from dtrain.errors import DataError, UsageError, nearest
from dtrain.files import canonical_json, sha256_of

BUILT_IN: dict[str, Callable[[str], Source]] = {"digits": named.digits, "synthetic": named.synthetic}
TORCHVISION: dict[str, Layout] = {"cifar10": named.CIFAR10, "cifar100": named.CIFAR100, "mnist": named.MNIST}


@dataclass(frozen=True)
class Place:
    """What `--dataset` was found to mean: a name for the cache, and a tar or folder; no path for what is built in."""

    name: str
    path: Path | None


def find_source(dataset: str, data_dir: Path, asked: Conversion | None = None, *, download: bool = True) -> Source:
    """The source called `dataset`: a name, or a path to a folder or tar.

    Raises what `locate` raises, and DataError for what cannot be a data set: no classes, one class, a test class that
    train lacks, a link in a tar. Lists all members: seconds.
    """
    place = locate(dataset, data_dir, download=download)
    return open_source(place, asked or Conversion(), digest_of(place))


def locate(dataset: str, data_dir: Path, *, download: bool = True) -> Place:
    """Where `dataset` is, without reading it; CIFAR or MNIST that are nowhere are downloaded if `download`.

    Looked for: built in; in `data_dir` torchvision's own folder, `<dataset>/`, `<dataset>.tar[.gz|.xz]`; a path.
    Raises UsageError for a name nobody knows, DataError for a known one that is not there. Cheap.
    """
    if dataset in BUILT_IN:
        return Place(dataset, None)
    layout = TORCHVISION.get(dataset)
    names = ([layout.folder] if layout else []) + [dataset, *(dataset + end for end in TAR_ENDINGS)]
    for candidate in [data_dir / name for name in names] + [Path(dataset)]:
        if candidate.is_dir() or (candidate.is_file() and candidate.name.endswith(TAR_ENDINGS)):
            return Place(_stem(dataset), candidate)
    if layout:
        looked = f"--dataset {dataset}: none of {', '.join(names)} in {data_dir.absolute()}"
        if not download:
            raise DataError(f"{looked}; put one there, name its folder with --data-dir, or try --dataset digits")
        return Place(dataset, named.download(layout, data_dir, looked))
    if os.sep in dataset or dataset.endswith(TAR_ENDINGS):
        raise DataError(f"--dataset {dataset}: no such folder or tar ({', '.join(TAR_ENDINGS)})")
    hint = nearest(dataset, [*BUILT_IN, *TORCHVISION])
    raise UsageError(f"--dataset {dataset}: no such name, path, or folder or tar in {data_dir.absolute()}; {hint}")


def _stem(dataset: str) -> str:
    name = Path(dataset).absolute().name
    return next((name.removesuffix(end) for end in TAR_ENDINGS if name.endswith(end)), name)


def open_source(place: Place, asked: Conversion, digest: str) -> Source:
    """Read what `locate` found as far as class names, labels and image size; see `find_source`, `digest_of`."""
    if place.path is None:
        return _fitted(BUILT_IN[place.name](digest), asked)
    for layout in TORCHVISION.values():
        if layout.is_in(place.path):
            return _fitted(layout.open(place.name, place.path, digest), asked)
    if (pair := pair_in(place.path)) is not None:
        return open_pair(place.name, pair, digest, asked)
    return open_members(place.name, place.path, digest, asked)


def _fitted(source: Source, asked: Conversion) -> Source:
    """A named set, in another size than its own where that is asked for."""
    size = asked.stored_size or source.image_size
    if size == source.image_size:
        return source

    def resized(decode: Decode) -> Pixels:
        return from_array(decode(), size, asked.resize)

    def stream(split: Split) -> Iterator[Decode]:
        return (partial(resized, decode) for decode in split.pictures())

    splits = {name: Split(split.labels, partial(stream, split)) for name, split in source.splits.items()}
    return replace(source, image_size=size, splits=splits)


# --- digests


def digest_of(place: Place, memo: Path | None = None) -> str:
    """64 hex digits that change when the content does.

    Of a tar: the SHA-256 of its bytes, remembered in the file `memo` by place, size and time of change. Of a folder:
    the SHA-256 of the names, sizes and times of its files, so that a start need not read them. Of what is built in: of
    its name and version.
    """
    if place.path is None:
        return hashlib.sha256(f"{place.name} 1".encode()).hexdigest()
    try:
        if place.path.is_file():
            return sha256_of(place.path) if memo is None else remembered_sha256(place.path, memo)
        return hashlib.sha256(canonical_json(list(_rows(place.path)))).hexdigest()
    except OSError as error:
        raise DataError(f"{place.path}: cannot be read ({error})") from error


def _rows(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of the files that a folder's source is read from."""
    if pair := pair_in(folder):
        files = [path for beton in pair for path in (beton, beton.with_suffix(".json")) if path.is_file()]
    elif any(layout.is_in(folder) for layout in TORCHVISION.values()):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        yield from stats_of(folder)
        return
    for path in files:
        stat = path.stat()
        yield path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns


def remembered_sha256(path: Path, memo: Path) -> str:
    """The SHA-256 of a file, computed again only when its place, size or time of change is not what `memo` remembers.

    A memo that cannot be read or written costs time, nothing else.
    """
    stat = path.stat()
    place = hashlib.sha256(bytes(path.resolve())).hexdigest()[:16]  # two tars of one name share a memo
    known = f"{place} {stat.st_size} {stat.st_mtime_ns}"
    with suppress(OSError, ValueError):
        remembered, digest = memo.read_text(encoding="ascii").rstrip("\n").rsplit(" ", 1)
        if remembered == known:
            return digest
    digest = sha256_of(path)
    with suppress(OSError):
        # Not whole_file: half a memo does not parse, and two fsyncs at each first use would buy nothing.
        memo.write_text(f"{known} {digest}\n", encoding="ascii")
    return digest
