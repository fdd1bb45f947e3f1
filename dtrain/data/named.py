"""The named data sets that come with dtrain, as data set plugins; plugins/README.md describes these.

Digits and synthetic pictures need no files. CIFAR and MNIST are looked for in the data folder, and downloaded if they
are not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.layouts import CIFAR10, CIFAR100, MNIST, Layout
from dtrain.data.members import TAR_ENDINGS, is_place, places_of
from dtrain.data.pictures import Labels, Pixels, gray
from dtrain.data.torchvision_sets import class_of, fetch
from dtrain.errors import DataError
from dtrain.keyed import Stream, integers, key

DIGITS = tuple("0123456789")


def digits(data_dir: Path) -> dict[str, Any]:
    """1,797 real handwritten digits (source: digits.txt), 8x8 upsampled to 32x32; 36 of each class are the test set."""

    def split(held_out: bool) -> tuple[Labels, Iterator[Pixels]]:
        with np.load(Path(__file__).with_name("digits.npz")) as file:
            small, labels = file["images"], file["labels"].astype(np.int64)
        keys = key(0, Stream.SPLIT, np.arange(len(labels)))
        is_test = np.zeros(len(labels), dtype=bool)
        for label in range(10):
            members = np.flatnonzero(labels == label)
            is_test[members[np.argsort(keys[members], kind="stable")[:36]]] = True
        chosen = is_test if held_out else ~is_test
        return labels[chosen], map(upsample, small[chosen])

    return {
        "digest": "1",
        "class_names": DIGITS,
        "image_size": 32,
        "train": partial(split, False),
        "test": partial(split, True),
    }


def upsample(image: Pixels) -> Pixels:
    """A digit uint8 [8, 8] in 0..16 -> uint8 [32, 32, 3] in 0..255, by bilinear interpolation in whole numbers.

    Pixel centres are aligned (as torch's align_corners=False): pixel x of 32 lies at (2x - 3) / 8 of 8, with the edge
    repeated. Weights are eighths, so the sum is exact and rounded once, half up: equal on every machine.
    """
    position = np.clip(2 * np.arange(32) - 3, 0, 8 * 7)
    left, weight = position // 8, position % 8
    right = np.minimum(left + 1, 7)
    wide = image.astype(np.int64)
    wide = wide[:, left] * (8 - weight) + wide[:, right] * weight
    full = wide[left] * (8 - weight)[:, None] + wide[right] * weight[:, None]
    return gray(((full * 255 + 512) // 1024).astype(np.uint8))  # 1024 = 16 (the largest value) x 8 x 8 (the weights)


SYNTHETIC_SIZES = {"train": 2000, "test": 400}


def synthetic(data_dir: Path) -> dict[str, Any]:
    """Ten random patterns of 4x4 coloured blocks with noise, 32x32, always the same; learnable in one epoch."""

    def split(name: str) -> tuple[Labels, Iterator[Pixels]]:
        patterns = 64 + integers(key(0, Stream.SYNTHETIC, 0, np.arange(10 * 4 * 4 * 3)), 128).reshape(10, 4, 4, 3)
        patterns = patterns.repeat(8, axis=1).repeat(8, axis=2)
        labels = np.arange(SYNTHETIC_SIZES[name], dtype=np.int64) % 10
        first = 0 if name == "train" else SYNTHETIC_SIZES["train"]
        return labels, (draw(patterns[label], index) for index, label in enumerate(labels, first))

    def draw(pattern: npt.NDArray[np.int64], index: int) -> Pixels:
        noise = integers(key(0, Stream.SYNTHETIC, 1, index, np.arange(32 * 32 * 3)), 128).reshape(32, 32, 3) - 64
        drawn: Pixels = (pattern + noise).astype(np.uint8)
        return drawn

    return {
        "digest": "1",
        "class_names": [f"pattern {i}" for i in range(10)],
        "image_size": 32,
        "train": partial(split, "train"),
        "test": partial(split, "test"),
    }


def cifar10(data_dir: Path, *, download: bool = True) -> Path:
    """CIFAR-10: 50,000 and 10,000 colour photographs of 32x32 in 10 classes (Krizhevsky 2009)."""
    return _found("cifar10", "CIFAR10", CIFAR10, data_dir, download)


def cifar100(data_dir: Path, *, download: bool = True) -> Path:
    """CIFAR-100: 50,000 and 10,000 colour photographs of 32x32 in 100 classes (Krizhevsky 2009)."""
    return _found("cifar100", "CIFAR100", CIFAR100, data_dir, download)


def mnist(data_dir: Path, *, download: bool = True) -> Path:
    """MNIST: 60,000 and 10,000 gray handwritten digits of 28x28 (LeCun et al. 1998)."""
    return _found("mnist", "MNIST", MNIST, data_dir, download)


def _found(name: str, torchvision_name: str, layout: Layout, data_dir: Path, download: bool) -> Path:
    """The folder or tar of a set: torchvision's own folder, else one of `places_of`, else it is downloaded.

    Raises DataError if it is not there and cannot be downloaded.
    """
    own = data_dir / layout.folder
    for path in (own, *places_of(name, data_dir)):
        if is_place(path):
            return path
    names = ", ".join([layout.folder, *(name + end for end in ("", *TAR_ENDINGS))])
    looked = f"--dataset {name}: none of {names} in {data_dir.absolute()}"
    if not download:
        raise DataError(f"{looked}; put one there, name its folder with --data-dir, or try --dataset digits")

    def make(part: Path) -> Path:
        class_of(torchvision_name)(part, download=True)
        return part / layout.folder

    return fetch(own, make, looked)
