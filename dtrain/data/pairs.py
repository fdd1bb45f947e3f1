"""Pairs of betons (files in FFCV's format) as sources: a folder with `train.beton`, and `test.beton` or `val.beton`.

They may have been written by dtrain or by FFCV. They are read like any other source and converted into the cache, so
that training always reads betons of one kind. Betons that FFCV has written hold no class names: without dtrain's
sidecar file the classes are called by their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.data.format import RAW, Content, checked, map_file
from dtrain.data.pictures import Decode, Pixels, Source, Split, common_size, from_array, picture
from dtrain.errors import DataError
from dtrain.settings.data import LARGEST_SIZE, Conversion

TRAIN, HELD_OUT = "train.beton", ("test.beton", "val.beton")


def pair_in(folder: Path) -> tuple[Path, Path] | None:
    """The paths of the two betons in a folder; None if it has no such pair. Cheap: looks for three files."""
    held_out = next((folder / name for name in HELD_OUT if (folder / name).is_file()), None)
    return (folder / TRAIN, held_out) if held_out is not None and (folder / TRAIN).is_file() else None


def open_pair(name: str, pair: tuple[Path, Path], digest: str, asked: Conversion) -> Source:
    """A pair of betons as a source. Pictures that are all equal squares keep their size, however large.

    Raises DataError for files that are damaged, hold no images, or whose labels do not belong together.
    """
    contents = [checked(path, "write it again") for path in pair]
    labels = [content.labels for content in contents]
    if not all(map(len, labels)):
        raise DataError(f"{pair[0].parent}: a beton of the pair holds no images; write it again")
    if strange := sorted(set(np.unique(labels[1]).tolist()) - set(np.unique(labels[0]).tolist())):
        raise DataError(f"{pair[1]}: label {strange[0]} is not in {pair[0].name}; write the pair again")
    class_names = _class_names(pair[0], int(labels[0].min()), int(labels[0].max()))
    size = asked.stored_size or common_size(
        ((int(w), int(h)) for c in contents for w, h in zip(c.image["width"], c.image["height"], strict=True)),
        largest=LARGEST_SIZE,
    )
    splits = {
        split: Split(content.labels, partial(_stream, path, content, size, asked.resize))
        for split, path, content in zip(("train", "test"), pair, contents, strict=True)
    }
    return Source(name, class_names, size, digest, splits)


def _class_names(path: Path, lowest: int, highest: int) -> tuple[str, ...]:
    """The class names in the sidecar file, or else the numbers from 0 to the highest label."""
    sidecar = path.with_suffix(".json")
    names = tuple(map(str, range(highest + 1)))
    if sidecar.is_file():
        try:
            names = tuple(map(str, json.loads(sidecar.read_text(encoding="utf-8"))["class_names"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{sidecar}: no class names can be read ({error}); repair or remove it") from None
    if lowest < 0 or highest >= len(names):
        raise DataError(f"{path}: holds the labels {lowest}..{highest} but {len(names)} class names; write it again")
    if len(names) < 2:
        raise DataError(f"{path}: holds a single class; give a pair with two or more")
    return names


def _stream(path: Path, content: Content, size: int, resize: str) -> Iterator[Decode]:
    flat = map_file(path)
    for number, (at, length, image) in enumerate(zip(content.positions, content.sizes, content.image, strict=True)):
        data = flat[int(at) : int(at + length)]
        if image["mode"] == RAW:
            pixels: Pixels = data.reshape(image["height"], image["width"], 3)
            yield partial(from_array, pixels, size, resize)
        else:
            yield partial(picture, str(path), f"image {number}", data.tobytes(), size, resize)
