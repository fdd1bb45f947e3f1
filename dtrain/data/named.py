"""Data sets that have a name: two that come along, and CIFAR and MNIST in torchvision's own layout.

Each is a function from where it lies to class names and splits, of pictures in their own size.
"""

from __future__ import annotations

import gzip
import math
import pickle
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.pictures import Decode, Labels, Pixels, Source, Split
from dtrain.errors import DataError, ProcessError
from dtrain.files import PARTIAL, Lock
from dtrain.keyed import Stream, integers, key

DOWNLOAD_SECONDS = 3600.0  # that a process waits for another one's download
AGAIN = "remove its folder and download it again"


def arrays(images: Iterable[Pixels]) -> Iterator[Decode]:
    """Arrays as a stream of pictures: nothing is left to decode."""
    return (partial(np.asarray, image) for image in images)


# --- built in


def digits(digest: str) -> Source:
    """1,797 real handwritten digits (digits.txt says whose), 8x8 upsampled to 32x32; 36 of each class are the test."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        small, labels = file["images"], file["labels"].astype(np.int64)
    keys = key(0, Stream.SPLIT, np.arange(len(labels)))
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        is_test[members[np.argsort(keys[members], kind="stable")[:36]]] = True

    def stream(chosen: npt.NDArray[np.bool_]) -> Iterator[Decode]:
        return (partial(upsample, image) for image in small[chosen])

    splits = {
        name: Split(labels[chosen], partial(stream, chosen))
        for name, chosen in (("train", ~is_test), ("test", is_test))
    }
    return Source("digits", tuple("0123456789"), 32, digest, splits)


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
    return gray(((full * 255 + 512) // 1024).astype(np.uint8))  # 1024 = 16 levels x 8 x 8


def gray(image: Pixels) -> Pixels:
    """uint8 [H, W] as uint8 [H, W, 3]."""
    return np.repeat(image[:, :, None], 3, axis=2)


SYNTHETIC_SIZES = {"train": 2000, "test": 400}


def synthetic(digest: str) -> Source:
    """Ten keyed patterns of 4x4 coloured blocks under keyed noise, 32x32, learnable in an epoch; needs no files."""
    patterns = 64 + integers(key(0, Stream.SYNTHETIC, 0, np.arange(10 * 4 * 4 * 3)), 128).reshape(10, 4, 4, 3)
    patterns = patterns.repeat(8, axis=1).repeat(8, axis=2)

    def draw(index: int, label: int) -> Pixels:
        noise = integers(key(0, Stream.SYNTHETIC, 1, index, np.arange(32 * 32 * 3)), 128).reshape(32, 32, 3) - 64
        drawn: Pixels = (patterns[label] + noise).astype(np.uint8)
        return drawn

    def stream(first: int, labels: Labels) -> Iterator[Decode]:
        return (partial(draw, index, int(label)) for index, label in enumerate(labels, first))

    splits, first = {}, 0
    for name, count in SYNTHETIC_SIZES.items():
        labels = np.arange(count, dtype=np.int64) % 10
        splits[name] = Split(labels, partial(stream, first, labels))
        first += count
    return Source("synthetic", tuple(f"pattern {i}" for i in range(10)), 32, digest, splits)


# --- CIFAR: pickles of arrays


@dataclass(frozen=True)
class _Cifar:
    names_file: str
    names_key: bytes
    labels_key: bytes
    files: dict[str, tuple[str, ...]]


_CIFAR10 = _Cifar(
    "batches.meta",
    b"label_names",
    b"labels",
    {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
)
_CIFAR100 = _Cifar("meta", b"fine_label_names", b"fine_labels", {"train": ("train",), "test": ("test",)})


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of CIFAR, which hold dicts, lists, bytes and numpy arrays, and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # where it lives depends on numpy's version
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _unpickle(path: Path, entry: bytes) -> Any:
    """One entry of the dict that a file of CIFAR is."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()[entry]
    except Exception as error:  # a damaged pickle raises nearly every kind
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error


def _open_cifar(cifar: _Cifar, name: str, path: Path, digest: str) -> Source:
    class_names = tuple(found.decode() for found in _unpickle(path / cifar.names_file, cifar.names_key))

    def stream(files: tuple[str, ...]) -> Iterator[Decode]:
        for file in files:
            rows = np.asarray(_unpickle(path / file, b"data"))
            if rows.dtype != np.uint8 or rows.shape[1:] != (3 * 32 * 32,):
                raise DataError(f"{path / file}: holds no images of 32x32; {AGAIN}")
            yield from arrays(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))

    splits = {
        split: Split(
            np.array([label for file in files for label in _unpickle(path / file, cifar.labels_key)], dtype=np.int64),
            partial(stream, files),
        )
        for split, files in cifar.files.items()
    }
    return Source(name, class_names, 32, digest, splits)


# --- MNIST: arrays of bytes behind a short head, each file gzipped or not

_MNIST = {"train": "raw/train-{}-ubyte", "test": "raw/t10k-{}-ubyte"}


def _idx(path: Path, dimensions: int) -> Pixels:
    """A file of the IDX format, or the same with .gz: two zero bytes, the type 8, the number of dimensions, each."""
    zipped = path.with_name(f"{path.name}.gz")
    path = path if path.is_file() or not zipped.is_file() else zipped
    try:
        with gzip.open(path) if path == zipped else path.open("rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); {AGAIN}") from error
    head = np.frombuffer(data[: 4 + 4 * dimensions].ljust(4 + 4 * dimensions, b"\0"), ">u4").tolist()
    shape = tuple(head[1:])
    if head[0] != 0x0800 + dimensions or len(data) != 4 + 4 * dimensions + math.prod(shape):
        raise DataError(f"{path}: is not an IDX file of {dimensions} dimensions, or cut short; {AGAIN}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _open_mnist(name: str, path: Path, digest: str) -> Source:
    def stream(file: Path, count: int) -> Iterator[Decode]:
        images = _idx(file, 3)
        if images.shape != (count, 28, 28):
            raise DataError(f"{file}: holds {images.shape}, not {count} images of 28x28; {AGAIN}")
        return arrays(map(gray, images))

    splits = {}
    for split, pattern in _MNIST.items():
        labels = _idx(path / pattern.format("labels-idx1"), 1).astype(np.int64)
        if labels.max(initial=0) > 9:
            raise DataError(f"{path / pattern.format('labels-idx1')}: holds a label outside 0..9; {AGAIN}")
        splits[split] = Split(labels, partial(stream, path / pattern.format("images-idx3"), len(labels)))
    return Source(name, tuple("0123456789"), 28, digest, splits)


# --- the layouts of torchvision


@dataclass(frozen=True)
class Layout:
    """A data set as torchvision keeps it: its class there, its folder, by which files one knows it, what reads it."""

    torchvision_name: str
    folder: str
    marks: tuple[str, ...]
    open: Callable[[str, Path, str], Source]

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` is one of these."""
        return any((folder / mark).is_file() for mark in self.marks)


CIFAR10 = Layout("CIFAR10", "cifar-10-batches-py", (_CIFAR10.names_file,), partial(_open_cifar, _CIFAR10))
CIFAR100 = Layout("CIFAR100", "cifar-100-python", (_CIFAR100.names_file,), partial(_open_cifar, _CIFAR100))
MNIST = Layout("MNIST", "MNIST", tuple(_MNIST["train"].format("labels-idx1") + end for end in ("", ".gz")), _open_mnist)


def download(layout: Layout, data_dir: Path, looked: str) -> Path:
    """Download by torchvision, into `data_dir` whole or not at all; one process does it, the others wait for it.

    looked: the beginning of the message where that fails.
    """
    from torchvision import datasets  # costs as much as torch, so only here

    folder = data_dir / layout.folder
    lock = Lock(data_dir / f".{layout.folder}.lock")
    try:
        deadline = time.monotonic() + DOWNLOAD_SECONDS
        while not lock.acquire():
            if time.monotonic() > deadline:
                raise ProcessError(f"{looked}; {lock.owner()} is downloading it for over {DOWNLOAD_SECONDS:g} s")
            time.sleep(0.05)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=data_dir) as part:
                getattr(datasets, layout.torchvision_name)(part, download=True)
                (Path(part) / layout.folder).rename(folder)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{looked}, and no download ({reason}); --dataset digits needs neither") from error
    finally:
        lock.release()
    return folder
