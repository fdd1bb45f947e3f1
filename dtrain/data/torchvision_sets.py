"""The data sets of torchvision under their own names, as a family of data set plugins: `--dataset torchvision/SVHN`.

torchvision downloads them and reads them for the conversion; after that only the converted files are used.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dtrain.data.pictures import Labels
from dtrain.errors import DataError, ProcessError, nearest
from dtrain.files import PARTIAL, Lock, canonical_json
from dtrain.keyed import stratified

DOWNLOAD_SECONDS = 3600.0  # how long a process waits for another one's download
HELD_OUT = 0.2  # the fraction that is held out as the test where a set has no split of its own

_BOOLEAN = ({"train": True}, {"train": False})
_TEST = ({"split": "train"}, {"split": "test"})
_TRAINVAL = ({"split": "trainval"}, {"split": "test"})
_VAL = ({"split": "train"}, {"split": "val"})
# The arguments with which the class of torchvision gives the training set and the test set; None if it has one split.
SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any]] | None] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _BOOLEAN),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    **dict.fromkeys(("Country211", "DTD", "Flowers102", "Food101", "GTSRB", "LFWPeople", "PCAM"), _TEST),
    **dict.fromkeys(("RenderedSST2", "STL10", "SVHN", "StanfordCars"), _TEST),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), _TRAINVAL),
    **dict.fromkeys(("CLEVRClassification", "Imagenette"), _VAL),
    "Places365": ({"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), None),
}


class TorchvisionSets:
    """The plugin family of these sets, all with one label for each picture, in `<data-dir>/torchvision/<name>/`."""

    @staticmethod
    def names() -> list[str]:
        """The classes of torchvision.datasets that are offered."""
        return list(SPLITS)

    @staticmethod
    def build(name: str, data_dir: Path, *, download: bool = True) -> dict[str, Any]:
        """The set of torchvision's class `name`, downloaded first if its folder is not there.

        If torchvision has no test split, a fifth of the pictures of each class is the test set, chosen by a hash.
        Raises DataError.
        """
        root = data_dir / "torchvision" / name
        parts = SPLITS[name]
        looked = f"--dataset torchvision/{name}: no folder {root.absolute()}"
        if not root.is_dir() and not download:
            raise DataError(f"{looked}; let torchvision download it there, or name its place with --data-dir")

        @functools.cache
        def opened(part: int) -> Any:
            return class_of(name)(root, **(parts[part] if parts else {}))

        def make(folder: Path) -> Path:
            (folder / name).mkdir()
            for more in parts or ({},):
                class_of(name)(folder / name, **more, download=True)
            return folder / name

        def split(part: int) -> tuple[Labels, Iterator[Image.Image]]:
            pictures = opened(part if parts else 0)
            labels = _labels(pictures)
            chosen = np.arange(len(labels))
            if not parts:
                held_out = stratified(labels, HELD_OUT, 0)
                chosen = np.flatnonzero(held_out if part else ~held_out)
            return labels[chosen], (pictures[int(index)][0] for index in chosen)

        def class_names() -> list[str]:
            known = getattr(opened(0), "classes", None) or getattr(opened(0), "categories", None)
            return [str(known_name) for known_name in known or range(int(_labels(opened(0)).max()) + 1)]

        fetch(root, make, looked)
        return {
            "digest": _digest_of(root),
            "class_names": class_names,
            "train": functools.partial(split, 0),
            "test": functools.partial(split, 1),
        }


def fetch(target: Path, make: Callable[[Path], Path], looked: str) -> Path:
    """The folder `target`, made first if it is not there: completely or not at all, by one process while others wait.

    make: is given an empty folder to fill, and returns the folder that becomes `target`. looked: where the data set has
    been looked for, as the beginning of the error message if `make` fails. Raises DataError, ProcessError.
    """
    if target.is_dir():
        return target
    lock = Lock(target.parent / f".{target.name}.lock")
    try:
        deadline = time.monotonic() + DOWNLOAD_SECONDS
        while not lock.acquire():
            if time.monotonic() > deadline:
                raise ProcessError(f"{looked}; {lock.owner()} has been downloading it for over {DOWNLOAD_SECONDS:g} s")
            time.sleep(0.05)
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=target.parent) as part:
                make(Path(part)).rename(target)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{looked}, and the download failed ({reason}); try again, or --dataset digits, which needs no download"
        ) from error
    finally:
        lock.release()
    return target


def class_of(name: str) -> Any:
    """The class `name` of torchvision.datasets. Raises DataError where this version of torchvision has none."""
    from torchvision import datasets  # as slow to import as torch, so only where it is needed

    if not hasattr(datasets, name):
        raise DataError(f"--dataset torchvision/{name}: not in this version of torchvision; {nearest(name, SPLITS)}")
    return getattr(datasets, name)


def _labels(pictures: Any) -> Labels:
    """The labels of a data set of torchvision, int64 [N]: from an attribute of it, else by reading every picture."""
    for name in ("targets", "labels", "_labels", "y"):
        kept = getattr(pictures, name, None)
        if kept is not None and len(kept) == len(pictures):
            return np.asarray(kept).astype(np.int64)
    return np.array([label for _, label in pictures], dtype=np.int64)


def _digest_of(root: Path) -> str:
    """A digest of the names, sizes and times of the files in a folder. Does not read the files."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    rows = [(path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(canonical_json(rows)).hexdigest()
