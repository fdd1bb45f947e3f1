"""Small folders and tars of pictures, and what a source makes of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dtrain.data.pictures import Source
from dtrain.data.sources import find_source
from dtrain.errors import DataError, DtrainError

Pixels = npt.NDArray[np.uint8]


def pixels_of(seed: int, size: int = 4) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


# four training and two test images; the labels of cat and dog are 0 and 1
FILES = {
    "train/cat/1.png": 1,
    "train/cat/2.png": 2,
    "train/dog/1.png": 3,
    "train/dog/2.png": 4,
    "test/cat/1.png": 5,
    "test/dog/1.png": 6,
}


def contents() -> dict[str, bytes]:
    return {name: png(pixels_of(seed)) for name, seed in FILES.items()}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    endings = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}
    with tarfile.open(path, endings[path.suffix]) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in others:
            tar.addfile(info)
    return path


def images_of(source: Source, split: str) -> list[Pixels]:
    return [decode() for decode in source.splits[split].pictures()]


def drained(source: Source) -> dict[str, tuple[list[int], list[bytes]]]:
    return {
        name: (split.labels.tolist(), [image.tobytes() for image in images_of(source, name)])
        for name, split in source.splits.items()
    }


def refusal(dataset: Path | str, data_dir: Path, kind: type[DtrainError] = DataError) -> str:
    """The one line with which a source is refused, when it is opened or while it is read."""
    options = {"download": "false"} if dataset in ("cifar10", "cifar100", "mnist") else None
    with pytest.raises(kind) as told:
        drained(find_source(str(dataset), data_dir, options=options))
    assert "\n" not in str(told.value)
    return str(told.value)
