"""`dtrain data`: converts a data set, describes or checks a converted file (beton), draws the images of a step."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.beton import Beton, Progress, open_beton, verify_beton
from dtrain.data.cache import prepare
from dtrain.errors import StorageError, UsageError
from dtrain.files import whole_file
from dtrain.run.console import Console
from dtrain.settings.augmentation import Augmentation
from dtrain.settings.config import TrainConfig
from dtrain.settings.data import Data


def convert(asked: Data) -> Generator[Progress, None, dict[str, Beton]]:
    """Convert a data set unless the cache has it; yields progress, returns the betons. Raises what `prepare` raises."""
    return prepare(asked.dataset, asked.data_dir, asked.cache_dir, asked.conversion(), options=asked.dataset_opt)


def inspect(path: Path) -> dict[str, Any]:
    """The facts about a beton, as values for JSON, after a check of its structure. Raises DataError."""
    return _facts(open_beton(path))


def verify(path: Path) -> dict[str, Any]:
    """The facts about a beton after a check of its structure and its checksum. Reads the file. Raises DataError."""
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


def show(config: TrainConfig, step: int, most: int, out: Path) -> str:
    """Draw the augmented images of step `step` of a run, with the names of their classes, to the PNG file `out`.

    step: counted from 1, as in the rows of metrics.jsonl. most: the first so many images of the global batch are drawn.
    The images come from the loader that the run would use, and their normalisation is undone. Returns a line that says
    what was drawn. Converts the data set first if needed. Raises UsageError for a step that the run does not have,
    StorageError if the file cannot be written.
    """
    import torch  # here, because the other commands of this file do not need it

    from dtrain import assembly
    from dtrain.commands.contact_sheet import Tile, contact_sheet
    from dtrain.data.dataset import Feed

    dataset = assembly.dataset_of(config, Console(True))
    plan = assembly.plan_of(config, **dataset.sizes, world_size=1)
    if not 1 <= step <= plan.total_steps:
        raise UsageError(f"--step {step}: the run has steps 1 to {plan.total_steps}")
    augmentation = config.augmentation
    feed = Feed(torch.float32, torch.device("cpu"), config.data.loader, config.data.mean, config.data.std)
    with dataset.train_loader(plan, 0, augmentation, feed) as loader:
        batch = loader.batch(step - 1)
        pictures = loader.pixels(batch)[:most]
    names = dataset.train.class_names
    tiles = [
        Tile(picture, _names_of(label, names), f"sample {index}")
        for picture, label, index in zip(pictures, batch.labels.numpy(), batch.indices.tolist(), strict=False)
    ]
    title = f"{config.data.dataset}, step {step} of {plan.total_steps}, epoch {plan.at(step - 1).epoch + 1}"
    height, width = pictures.shape[1:3]
    size = f"{len(tiles)} of {len(batch.indices)} images, {height} x {width}"
    sheet = contact_sheet(title, f"{size}; {_told(augmentation)}", tiles)
    try:
        with whole_file(out) as part:
            sheet.save(part, "PNG")
    except OSError as error:
        raise StorageError(f"--out {out}: {error.strerror}; name a file that can be written") from None
    return f"{out}: {title}, {size}"


def _names_of(label: np.ndarray[Any, Any], names: tuple[str, ...]) -> list[str]:
    """The class of an image; for a mixed image both classes with their weights, the larger first."""
    if label.ndim == 0:
        return [names[int(label)]]
    order = np.argsort(-label, kind="stable")[:2]
    return [f"{names[i]} {100 * label[i]:.0f} %" for i in order if label[i] >= 0.005]


def _told(augmentation: Augmentation) -> str:
    """The augmentations that are on, with their values, as text."""
    told = []
    for name, value in vars(augmentation).items():
        if value is True:
            told.append(name)
        elif value:
            told.append(f"{name} {','.join(f'{v:g}' for v in (value if isinstance(value, tuple) else (value,)))}")
    return ", ".join(told) or "no augmentation"
