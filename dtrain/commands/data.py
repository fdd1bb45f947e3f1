"""`dtrain data convert|inspect|verify`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.beton import Beton, Progress, open_beton, prepare, verify_beton


def convert(dataset: str, data_dir: Path, cache_dir: Path | None) -> Generator[Progress, None, dict[str, Beton]]:
    """The betons of a data set, converted if they are not there; yields progress. Raises what `prepare` raises."""
    return prepare(dataset, data_dir, cache_dir)


def inspect(path: Path) -> dict[str, Any]:
    """What a beton holds, as plain values. Raises DataError."""
    return _facts(open_beton(path))


def verify(path: Path) -> dict[str, Any]:
    """The same after every byte was checked. Raises DataError."""
    return {**_facts(verify_beton(path)), "sound": True}


def _facts(beton: Beton) -> dict[str, Any]:
    return {
        "path": str(beton.path),
        "split": beton.split,
        "images": len(beton.labels),
        "image_size": beton.image_size,
        "channels": beton.channels,
        "classes": len(beton.class_names),
        "class_names": list(beton.class_names),
        "images_per_class": np.bincount(beton.labels, minlength=len(beton.class_names)).tolist(),
        "mean": [round(value, 4) for value in beton.mean],
        "std": [round(value, 4) for value in beton.std],
        "sha256": beton.sha256,
        "source_digest": beton.source_digest,
    }
