"""Folders in which torchvision keeps CIFAR and MNIST: recognised by the files in them, and read without torchvision.

A folder of this kind may have any name and lie anywhere; `dtrain.data.named` knows where to look for it.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.pictures import Decode, Pixels, Source, Split, gray
from dtrain.errors import DataError

AGAIN = "remove its folder and download it again"


def arrays(images: Iterable[Pixels]) -> Iterator[Decode]:
    """A stream of functions, as `Split.pictures` returns it, for pictures that are arrays already."""
    return (partial(np.asarray, image) for image in images)


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
    """Reads the pickles of CIFAR, which hold dicts, lists, bytes and numpy arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # the module that it lives in depends on numpy's version
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _unpickle(path: Path, entry: bytes) -> Any:
    """One entry of the dict that a file of CIFAR holds. Raises DataError for a damaged file."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()[entry]
    except Exception as error:  # a damaged pickle may raise almost any exception
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


# --- MNIST: arrays of bytes after a short header, each file gzipped or not

_MNIST = {"train": "raw/train-{}-ubyte", "test": "raw/t10k-{}-ubyte"}


def _idx(path: Path, dimensions: int) -> Pixels:
    """The array in a file of the IDX format, which may be gzipped. Raises DataError for a damaged file.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, the length of each as big-endian
    uint32, then the values.
    """
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


# --- the kinds


@dataclass(frozen=True)
class Layout:
    """One kind of folder.

    folder: the name that torchvision gives it. marks: files of which at least one is in every such folder. open: reads
    a folder; called with the name of the data set, the path and the digest.
    """

    folder: str
    marks: tuple[str, ...]
    open: Callable[[str, Path, str], Source]

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` is of this kind."""
        return any((folder / mark).is_file() for mark in self.marks)


CIFAR10 = Layout("cifar-10-batches-py", (_CIFAR10.names_file,), partial(_open_cifar, _CIFAR10))
CIFAR100 = Layout("cifar-100-python", (_CIFAR100.names_file,), partial(_open_cifar, _CIFAR100))
MNIST = Layout("MNIST", tuple(_MNIST["train"].format("labels-idx1") + end for end in ("", ".gz")), _open_mnist)
LAYOUTS = (CIFAR10, CIFAR100, MNIST)


def layout_of(folder: Path) -> Layout | None:
    """The kind of a folder; None if it is of no kind in LAYOUTS. Cheap."""
    return next((layout for layout in LAYOUTS if layout.is_in(folder)), None)
