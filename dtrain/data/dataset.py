"""The data set of a run: two betons (converted files), the samples of each split, and the loaders of their batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain import plugins
from dtrain.data.batch import Batch, Request
from dtrain.data.beton import Beton, Progress
from dtrain.data.cache import prepare
from dtrain.data.loader import Loader, open_loader
from dtrain.keyed import stratified
from dtrain.plan import Plan
from dtrain.settings.augmentation import Augmentation
from dtrain.settings.data import Data


@dataclass(frozen=True)
class Feed:
    """The form in which batches reach the network.

    dtype, device: of the images. reader: auto, ffcv or memory; see `open_loader`. mean, std: in 0..1, one number or one
    for each channel; None for those of the training set. channels_last: memory layout of the images. threads: compute
    threads of this process. Where the network runs on a GPU, the augmentation kernels use all of them; where it runs on
    the CPU, they are left to the network, and the kernels use one. The bytes of a batch do not depend on their number.
    """

    dtype: torch.dtype
    device: torch.device
    reader: str = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels_last: bool = True
    threads: int = 1

    @property
    def kernel_threads(self) -> int:
        """The number of threads for the augmentation kernels."""
        return self.threads if self.device.type == "cuda" else 1


@dataclass(frozen=True, eq=False)
class DataSet:
    """The images of a run.

    image_size, channels: of the images that the network is given, at the largest stage of the run; the betons may store
    larger images and more channels. train, train_samples: the file of the training set, and which of its samples belong
    to it; likewise for the evaluation. Samples are int64 [n] in ascending order.
    """

    image_size: int
    channels: int
    train: Beton
    train_samples: npt.NDArray[np.int64]
    evaluation: Beton
    evaluation_samples: npt.NDArray[np.int64]
    evaluation_split: str  # "test", or "val" for a part of the training set

    @property
    def sizes(self) -> dict[str, int]:
        """The number of training images and the side in pixels that the network is given: arguments of `make_plan`."""
        return {"train_size": len(self.train_samples), "image_size": self.image_size}

    @property
    def digest(self) -> str:
        """The digests of both betons; processes with equal digests have equal images and labels."""
        return f"{self.train.digest} {self.evaluation.digest}"

    @property
    def folder(self) -> Path:
        """The folder of the betons, which other processes of this host pass to `load_dataset` as `found`."""
        return self.train.path.parent

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of the training set in 0..1, one number for each channel that the network is given."""
        return self.train.mean if self.channels == 3 else (self.train.gray_mean,)

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of the training set in 0..1, one number for each channel that the network is given."""
        return self.train.std if self.channels == 3 else (self.train.gray_std,)

    @property
    def left_out(self) -> list[str]:
        """Messages for the user: one for each split from which pictures that cannot be decoded were left out."""
        splits = {"train": self.train} | ({"test": self.evaluation} if self.evaluation_split == "test" else {})
        return [
            f"left out of {name}, since they cannot be decoded: {len(beton.skipped)}; `dtrain data inspect` lists them"
            for name, beton in splits.items()
            if beton.skipped
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint records about the data set, in JSON's types.

        A resume compares it with the data set that it finds, and `load_network` reads it.
        """
        return {
            "class_names": list(self.train.class_names),
            "channels": self.channels,
            "image_size": self.image_size,
            "train_size": len(self.train_samples),
            "data": self.digest,
        }

    def train_loader(self, plan: Plan, rank: int, augmentation: Augmentation, feed: Feed) -> Loader:
        """The loader of the augmented batches of process `rank`, by step. Close it after use."""

        def request_at(step: int) -> Request | None:
            if step >= plan.total_steps:
                return None
            now = plan.at(step)
            return Request(self.train_samples[plan.batch(step)[now.shares[rank].positions]], now.epoch, now.image_size)

        return self._open(self.train, request_at, feed, augmentation, seed=plan.seed, largest=plan.largest_share)

    def chunks(
        self, rank: int, world_size: int, feed: Feed, *, chunk_size: int, image_size: int | None = None
    ) -> Chunks:
        """One pass over the evaluation split, cut into the same chunks of `chunk_size` images for every world size.

        image_size: side in pixels to which the images are shrunk, if the network is evaluated on images smaller than
        `self.image_size`. Close its loader after use.
        """
        samples = self.evaluation_samples

        def request_at(turn: int) -> Request | None:
            first = (turn * world_size + rank) * chunk_size
            if first >= len(samples):
                return None
            return Request(samples[first : first + chunk_size], None, image_size)

        count = math.ceil(len(samples) / chunk_size)
        loader = self._open(self.evaluation, request_at, feed, None, seed=0, largest=chunk_size)
        return Chunks(loader, rounds=math.ceil(count / world_size), mine=len(range(rank, count, world_size)))

    def _open(
        self,
        beton: Beton,
        request_at: Callable[[int], Request | None],
        feed: Feed,
        augmentation: Augmentation | None,
        *,
        seed: int,
        largest: int,
    ) -> Loader:
        return open_loader(
            beton,
            request_at,
            kind=feed.reader,
            image_size=self.image_size,
            channels=self.channels,
            augmentation=augmentation,
            seed=seed,
            mean=feed.mean or self.mean,
            std=feed.std or self.std,
            dtype=feed.dtype,
            device=feed.device,
            channels_last=feed.channels_last,
            kernel_threads=feed.kernel_threads,
            largest=largest,
        )


@dataclass(frozen=True)
class Chunks:
    """The part of an evaluation that one process computes: process r of W takes the chunks r, r + W, r + 2W and so on.

    A chunk is a batch of the evaluation. The chunks do not depend on W: in a batch of another size the network's
    arithmetic rounds differently, which can change a count. rounds: the largest number of chunks that any process has.
    mine: how many this process has.
    """

    loader: Loader
    rounds: int
    mine: int

    def batch(self, turn: int) -> Batch | None:
        """The chunk of round `turn`, or None if this process has none left."""
        return self.loader.batch(turn) if turn < self.mine else None


def load_dataset(asked: Data, *, arch: str, seed: int, found: Path | None = None) -> Generator[Progress, None, DataSet]:
    """The data set that the settings name, converted first if it is not in the cache; yields progress.

    arch: if `channels` is auto, the images have one channel if every training image is gray and this architecture has
    the parameter in_channels. seed: determines which samples `val_split` holds out. found: the folder of betons that
    another process of this host has prepared for the same settings; see `prepare`, whose errors are raised.
    """
    conversion, where = asked.conversion(), (asked.data_dir, asked.cache_dir)
    betons = yield from prepare(asked.dataset, *where, conversion, options=asked.dataset_opt, found=found)
    train, test = betons["train"], betons["test"]
    seen = (conversion.image_size or train.image_size, _channels(asked.channels, arch, train))
    if asked.val_split is None:
        return DataSet(*seen, train, np.arange(len(train.labels)), test, np.arange(len(test.labels)), "test")
    held = stratified(train.labels, asked.val_split, seed)
    return DataSet(*seen, train, np.flatnonzero(~held), train, np.flatnonzero(held), "val")


def _channels(asked: str, arch: str, train: Beton) -> int:
    if asked != "auto":
        return int(asked)
    gray = train.gray_images == len(train.labels)
    takes = gray and plugins.accepts(plugins.load(plugins.find("architecture", arch)), "in_channels")
    return 1 if takes else 3
