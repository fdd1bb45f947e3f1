"""`dtrain data convert|inspect|verify`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.config import Conversion
from dtrain.data.beton import Beton, Progress, open_beton, verify_beton
from dtrain.data.cache import prepare


def convert(
    dataset: str, data_dir: Path, cache_dir: Path | None, asked: Conversion | None = None
) -> Generator[Progress, None, dict[str, Beton]]:
    """The betons of a data set, converted if they are not there; yields progress. Raises what `prepare` raises."""
    return prepare(dataset, data_dir, cache_dir, asked)


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
        "stored": beton.stored,
        "gray_images": beton.gray_images,
        "classes": len(beton.class_names),
        "class_names": list(beton.class_names),
        "images_per_class": np.bincount(beton.labels, minlength=len(beton.class_names)).tolist(),
        "mean": [round(value, 4) for value in beton.mean],
        "std": [round(value, 4) for value in beton.std],
        "gray_mean": round(beton.gray_mean, 4),
        "gray_std": round(beton.gray_std, 4),
        "skipped": [f"{name} ({reason})" for name, reason in beton.skipped],
        "passed_by": list(beton.passed_by),
        "sha256": beton.sha256,
        "digest": beton.digest,
        "source_digest": beton.source_digest,
    }
