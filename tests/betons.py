"""Small sources and their betons, for tests of the rooms that write, find and read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain.data.beton import Beton, open_beton
from dtrain.data.cache import convert
from dtrain.data.dataset import DataSet, Feed, load_dataset
from dtrain.data.format import FIELD, HEADER
from dtrain.data.layouts import arrays
from dtrain.data.pictures import Source, Split
from dtrain.settings.config import TrainConfig

Pixels = npt.NDArray[np.uint8]

CLASSES = ("cat", "cow", "dog")
COUNT, SIZE = 700, 32  # 682 images of 3,072 bytes fill a page of 2 MiB, so there are two pages
HEAD = HEADER.itemsize + 2 * FIELD.itemsize  # where the samples' records begin


def pixels_of(count: int, size: int = SIZE) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def source_of(train: Pixels, test: Pixels, *, stream: Callable[[Pixels], Iterator[Pixels]] = iter) -> Source:
    splits = {
        name: Split(np.arange(len(pixels), dtype=np.int64) * 7 % 3, lambda pixels=pixels: arrays(stream(pixels)))
        for name, pixels in (("train", train), ("test", test))
    }
    return Source("pets", CLASSES, train.shape[1], "0" * 64, splits)


def converted(folder: Path, source: Source, **how: Any) -> Beton:
    folder.mkdir(exist_ok=True)
    list(convert(source, folder, **how))
    return open_beton(folder / "train.beton")


def pixels_in(beton: Beton) -> Pixels:
    flat = np.fromfile(beton.path, np.uint8)
    size = beton.image_size
    rows = [flat[int(at) : int(at) + size * size * 3].reshape(size, size, 3) for at in beton.pixel_offsets]
    return np.stack(rows)


def smooth(count: int, size: int = SIZE) -> Pixels:
    """Pictures that JPEG likes: a slope each, of its own directions."""
    y, x = np.mgrid[0:size, 0:size] / size
    slopes = np.arange(count * 6).reshape(count, 1, 1, 3, 2) * 37 % 200
    return (slopes[..., 0] * x[..., None] + slopes[..., 1] * y[..., None] / 4).astype(np.uint8)


def finished(steps: Any) -> dict[str, Beton]:
    """Run a conversion to its end and return its betons."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            betons: dict[str, Beton] = end.value
            return betons


def loaded(config: TrainConfig) -> DataSet:
    """The data set that these settings name."""
    steps = load_dataset(config.data, arch=config.network.arch, seed=config.run.seed)
    return finished(steps)  # type: ignore[return-value]


def feed_of(config: TrainConfig) -> Feed:
    """Batches as these settings ask for them, in float32 on the CPU."""
    cpu = torch.device("cpu")
    return Feed(torch.float32, cpu, config.data.loader, config.data.mean, config.data.std, config.machine.channels_last)


def edit(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")
