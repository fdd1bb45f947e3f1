"""`dtrain bench loaders`: compares each reader, with flip, shift and cutout, with its augmentation code alone."""

from __future__ import annotations

import time
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from dtrain.commands.data import convert
from dtrain.data.augment import decide
from dtrain.data.batch import Request
from dtrain.data.beton import Beton
from dtrain.data.loader import open_loader
from dtrain.data.pixels import lookup_table, write_images
from dtrain.run.console import Console
from dtrain.settings.augmentation import Augmentation
from dtrain.settings.data import Data
from dtrain_bench.ratios import ratios, show

BATCH = 500
AUGMENTATION = Augmentation(flip=True, shift=4, cutout=8)


def resident_rate(beton: Beton, batches: int) -> float:
    """Images per second of the augmentation code alone, from an array in memory, in one thread."""
    flat = np.fromfile(beton.path, np.uint8)
    lut = lookup_table(beton.mean, beton.std, "float32")
    size, count = beton.image_size, len(beton.labels)
    samples = np.arange(BATCH) % count
    started = time.perf_counter()
    for _ in range(batches):
        decisions = decide(AUGMENTATION, 0, 0, samples, size)
        out = np.empty((BATCH, size, size, 3), np.float32)
        write_images(flat, beton.pixel_offsets[samples], size, beton.channels, decisions, lut, out)
    return batches * BATCH / (time.perf_counter() - started)


def reader_rate(beton: Beton, kind: str, batches: int) -> float:
    """Images per second that a loader with a reader of this kind hands out, after its first batch."""
    samples = np.arange(BATCH) % len(beton.labels)
    with open_loader(
        beton,
        lambda step: Request(samples, 0) if step <= batches else None,
        kind=kind,
        image_size=beton.image_size,
        channels=beton.channels,
        augmentation=AUGMENTATION,
        mean=beton.mean,
        std=beton.std,
        dtype=torch.float32,
        device=torch.device("cpu"),
        largest=BATCH,
    ) as loader:
        loader.batch(0)
        started = time.perf_counter()
        for step in range(1, batches + 1):
            loader.batch(step)
        return batches * BATCH / (time.perf_counter() - started)


def main(*, quick: bool, as_json: bool) -> None:
    """Measure and print. quick: three short turns, to try it out."""
    turns, batches = (3, 20) if quick else (9, 200)
    beton = Console(False).converting(convert(Data(dataset="synthetic")))["train"]
    kinds = ["memory"] + (["ffcv"] if find_spec("ffcv") else [])
    resident_rate(beton, 2)  # compiles the function outside the measurement
    results = {
        kind: ratios(
            partial(reader_rate, beton, kind, batches),
            lambda: resident_rate(beton, batches),
            turns=turns,
        )
        for kind in kinds
    }
    show("loaders", results, "images per second", as_json=as_json)
