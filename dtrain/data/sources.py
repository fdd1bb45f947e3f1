"""Where images come from: `--dataset` as a name, a file's function, a folder, a tar or a pair of betons -> Source.

A name is a data set plugin's, and is looked for through the one door for plugins; a folder or tar needs no code. What
each kind is made of stands in `offered` (plugins), `members`, `layouts` and `pairs`; how a picture becomes bytes, in
`pictures`.
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
    """What `--dataset` was found to mean: a name for the cache, and either a tar or folder or what a plugin offers."""

    name: str
    path: Path | None = None
    offer: Offer | None = None


def find_source(
    dataset: str, data_dir: Path, asked: Conversion | None = None, options: Mapping[str, str] | None = None
) -> Source:
    """The source called `dataset`: a name, a file's function, or a path to a folder or tar.

    options: of a named set, as text. Raises what `locate` raises, and DataError for what cannot be a data set: no
    classes, one class, a test class that train lacks, a link in a tar. Lists all members, which may take seconds.
    """
    place = locate(dataset, data_dir, options)
    return open_source(place, asked or Conversion(), digest_of(place))


def locate(dataset: str, data_dir: Path, options: Mapping[str, str] | None = None) -> Place:
    """Where `dataset` is, without reading it. The function of a named set is called, which may download the set.

    A name that some package offers wins; then `<dataset>/` and `<dataset>.tar[.gz|.xz]` in `data_dir`; then a path, so
    that ./name reaches a folder that has the name of a plugin. Raises UsageError for a name nobody knows and for
    options of what has none, PluginError for a plugin that cannot be imported, DataError for pictures that are not
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
    """Call the function of a named set, with options in their own types.

    A DtrainError comes out as it is; any other exception becomes a DataError that names the plugin's distribution.
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
    """Read what `locate` found as far as class names, labels and image size; see `find_source`, `digest_of`."""
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
    """A source in another size than its own, where that is asked for."""
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
    the SHA-256 of the names, sizes and times of its files, so that a start need not read them. Of a named set: of its
    name, its options and the digest that its function gives.
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
    """The SHA-256 of a file, computed again only when its place, size or time of change is not what `memo` remembers.

    A memo that cannot be read or written costs the time to compute it, and does no other harm.
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
