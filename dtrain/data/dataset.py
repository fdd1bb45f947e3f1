"""The data set of a run: two betons, which of their samples are trained on or evaluated, and loaders of batches."""

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
    """In which form batches reach the network, whatever they are made of.

    dtype, device: of the images. reader: auto, ffcv or memory; see `open_loader`. mean, std: in 0..1, one number or one
    for each channel; None for those of the training set. channels_last: memory layout of the images. threads: compute
    threads of this process; the loader's kernel uses them where the network runs on a GPU. On a CPU they belong to the
    network and the kernel has one. Bytes do not depend on it.
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
        """Threads that move pixels."""
        return self.threads if self.device.type == "cuda" else 1


@dataclass(frozen=True, eq=False)
class DataSet:
    """The images of a run.

    image_size, channels: of the images that the network sees, at its largest stage; the betons may hold more. train,
    train_samples: the training set, and which samples of the beton belong to it; likewise for the evaluation. Samples
    are int64 [n] in ascending order.
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
        """How many images are trained on, and the side in pixels at which the network sees them: what a plan needs."""
        return {"train_size": len(self.train_samples), "image_size": self.image_size}

    @property
    def digest(self) -> str:
        """The digests of both betons; processes with equal digests have equal images and labels."""
        return f"{self.train.digest} {self.evaluation.digest}"

    @property
    def folder(self) -> Path:
        """Where the betons lie: what `load_dataset` takes as `found`."""
        return self.train.path.parent

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of the training set in 0..1, one number for each channel that the network sees."""
        return self.train.mean if self.channels == 3 else (self.train.gray_mean,)

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of the training set in 0..1, one number for each channel that the network sees."""
        return self.train.std if self.channels == 3 else (self.train.gray_std,)

    @property
    def left_out(self) -> list[str]:
        """For the user, a line for each split from which pictures were left out because they cannot be decoded."""
        splits = {"train": self.train} | ({"test": self.evaluation} if self.evaluation_split == "test" else {})
        return [
            f"left out of {name}, since they cannot be decoded: {len(beton.skipped)}; `dtrain data inspect` lists them"
            for name, beton in splits.items()
            if beton.skipped
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint records of the data set, in JSON's types: a resume compares it, `load_network` reads it."""
        return {
            "class_names": list(self.train.class_names),
            "channels": self.channels,
            "image_size": self.image_size,
            "train_size": len(self.train_samples),
            "data": self.digest,
        }

    def train_loader(self, plan: Plan, rank: int, augmentation: Augmentation, feed: Feed) -> Loader:
        """The augmented batches of process `rank` by step. Close it after use."""

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

        image_size: side to which whole pictures are shrunk, where the network is evaluated on less than
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
    """The part of an evaluation that one process computes: of the chunks of the split, process r of W takes number r,
    r + W, r + 2W and so on.

    The chunks do not depend on W, since other sizes would round otherwise, which can change a count. rounds: the
    largest number of chunks that a process has. mine: how many this one has.
    """

    loader: Loader
    rounds: int
    mine: int

    def batch(self, turn: int) -> Batch | None:
        """The chunk of round `turn`, or None if this process has none left."""
        return self.loader.batch(turn) if turn < self.mine else None


def load_dataset(asked: Data, *, arch: str, seed: int, found: Path | None = None) -> Generator[Progress, None, DataSet]:
    """The data set that the settings name, converted first where that is due; yields progress.

    arch: with `channels` auto, one channel is taken where every training image is gray and this architecture has the
    parameter in_channels. seed: chooses what `val_split` holds out. found: the folder of betons that another process of
    this host has prepared for the same settings; see `prepare`, whose errors are raised.
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
