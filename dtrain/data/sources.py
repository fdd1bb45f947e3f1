"""Finds what `--dataset` names and opens it as a Source: a plugin, a function in a file, a folder, a tar or two betons.

Plugins are found by `dtrain.plugins`; a folder or tar needs no code. How each kind is read stands in `offered`
(plugins), `members` (folders and tars of image files), `layouts` (folders of CIFAR and MNIST) and `pairs` (betons); how
an image file becomes an array stands in `pictures`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dtrain import plugins
from dtrain.data.layouts import layout_of
from dtrain.data.members import TAR_ENDINGS, is_place, open_members, places_of, stats_of
from dtrain.data.offered import SEE, Offer
from dtrain.data.pairs import open_pair, pair_in
from dtrain.data.pictures import Decode, Pixels, Source, Split, from_array
from dtrain.errors import DataError, DtrainError, UsageError, nearest
from dtrain.files import canonical_json, sha256_of
from dtrain.settings.data import Conversion


@dataclass(frozen=True)
class Place:
    """What `--dataset` names: a name for the cache, and either a path or the mapping that a plugin returned."""

    name: str
    path: Path | None = None
    offer: Offer | None = None


def find_source(
    dataset: str, data_dir: Path, asked: Conversion | None = None, options: Mapping[str, str] | None = None
) -> Source:
    """The source that `dataset` names: a plugin, a function in a file, or the path of a folder or tar.

    options: of a named set, as text. Raises what `locate` raises, and DataError for what cannot be a data set: no
    classes, one class, a test class that train lacks, a link in a tar. Lists all members, which may take seconds.
    """
    place = locate(dataset, data_dir, options)
    return open_source(place, asked or Conversion(), digest_of(place))


def locate(dataset: str, data_dir: Path, options: Mapping[str, str] | None = None) -> Place:
    """Where `dataset` is, without reading it. The function of a named set is called, which may download the set.

    A plugin of this name comes first; then `<dataset>/` and `<dataset>.tar[.gz|.xz]` in `data_dir`; then `dataset` as a
    path, so ./name reaches a folder that has the name of a plugin. Raises UsageError for an unknown name and for
    options if `dataset` is a path, PluginError for a plugin that cannot be imported, DataError for files that are not
    there. Cheap, except for a download.
    """
    if plugins.offered("dataset", dataset) or "::" in dataset:
        plugin = plugins.find("dataset", dataset)
        function = plugins.load(plugin)
        values = plugins.parse_options(function, options or {}, what=f"data set {dataset}")
        return place_of(plugin, function, data_dir, values)
    if options:
        raise UsageError(f"--dataset-opt {next(iter(options))}: {dataset} is no named data set, so it has no options")
    for candidate in places_of(dataset, data_dir):
        if is_place(candidate):
            return Place(_stem(dataset), candidate)
    if os.sep in dataset or dataset.endswith(TAR_ENDINGS):
        raise DataError(f"--dataset {dataset}: no such folder or tar ({', '.join(TAR_ENDINGS)})")
    hint = nearest(dataset, [plugin.name for plugin in plugins.listed("dataset")])
    raise UsageError(f"--dataset {dataset}: no such name, path, or folder or tar in {data_dir.absolute()}; {hint}")


def place_of(plugin: plugins.Plugin, function: Callable[..., Any], data_dir: Path, options: Mapping[str, Any]) -> Place:
    """Call the function of a named set with `options`, which have been converted to their types.

    A DtrainError is raised unchanged; any other exception becomes a DataError that names the plugin's distribution.
    """
    try:
        given = function(data_dir, **options)
    except DtrainError:
        raise
    except Exception as error:
        raise DataError(f"{plugin.said} fails: {type(error).__name__}: {error}") from error
    name = re.split("[/:]", plugin.name)[-1]
    if not isinstance(given, str | Path):
        return Place(name, offer=Offer.of(plugin, options, given))
    if not is_place(Path(given)):
        raise DataError(f"{plugin.said} returns the path {given}, where no folder or tar is; {SEE}")
    return Place(name, Path(given))


def _stem(dataset: str) -> str:
    name = Path(dataset).absolute().name
    return next((name.removesuffix(end) for end in TAR_ENDINGS if name.endswith(end)), name)


def open_source(place: Place, asked: Conversion, digest: str) -> Source:
    """The source at the place that `locate` found. Reads only as much as class names, labels and image size need.

    digest: from `digest_of`. Raises DataError; see `find_source`.
    """
    if place.offer is not None:
        return place.offer.source(place.name, asked)
    path = _path_of(place)
    if (layout := layout_of(path)) is not None:
        return _fitted(layout.open(place.name, path, digest), asked)
    if (pair := pair_in(path)) is not None:
        return open_pair(place.name, pair, digest, asked)
    return open_members(place.name, path, digest, asked)


def _path_of(place: Place) -> Path:
    if place.path is None:
        raise ValueError(f"{place.name} is neither a path nor an offer")
    return place.path


def _fitted(source: Source, asked: Conversion) -> Source:
    """The source with its pictures resized, if a size is asked for that is not its own."""
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

    Of a tar: the SHA-256 of its bytes; the file `memo` keeps it, with the tar's path, size and time of change, so that
    it is not computed again while these stay the same. Of a folder: the SHA-256 of the names, sizes and times of its
    files, so the files are not read. Of a named set: of its name, its options and the digest that its function returns.
    """
    if place.offer is not None:
        return place.offer.digest
    path = _path_of(place)
    try:
        if path.is_file():
            return sha256_of(path) if memo is None else remembered_sha256(path, memo)
        return hashlib.sha256(canonical_json(list(_rows(path)))).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _rows(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of each file that the source of a folder is read from."""
    if pair := pair_in(folder):
        files = [path for beton in pair for path in (beton, beton.with_suffix(".json")) if path.is_file()]
    elif layout_of(folder) is not None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    else:
        yield from stats_of(folder)
        return
    for path in files:
        stat = path.stat()
        yield path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns


def remembered_sha256(path: Path, memo: Path) -> str:
    """The SHA-256 of a file, computed anew only if its path, size or time of change is not the one kept in `memo`.

    If `memo` cannot be read or written, the digest is computed each time.
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
        # written without whole_file: half a memo does not parse, so two fsyncs would gain nothing
        memo.write_text(f"{known} {digest}\n", encoding="ascii")
    return digest
