"""What a run trains on and is evaluated on: two betons, which of their samples, and a loader for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dtrain import plugins
from dtrain.config import TrainConfig
from dtrain.data.augment import Augmentation
from dtrain.data.beton import Beton, Progress
from dtrain.data.cache import prepare
from dtrain.data.loader import Batch, Loader, Request, open_loader
from dtrain.keyed import stratified
from dtrain.plan import Plan


@dataclass(frozen=True, eq=False)
class DataSet:
    """Where a run's images come from. *_samples: indices into the beton beside, int64 [n], in ascending order.

    image_size, channels: of what the network sees, which may be less than what the betons hold.
    """

    image_size: int
    channels: int
    train: Beton
    train_samples: npt.NDArray[np.int64]
    evaluation: Beton
    evaluation_samples: npt.NDArray[np.int64]
    evaluation_split: str  # "test", or "val" for a part of the training set

    @property
    def digest(self) -> str:
        """What two processes must have in common: the SHA-256 of all that shapes numbers in both betons."""
        return f"{self.train.digest} {self.evaluation.digest}"

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the training set, in 0..1, a number for each channel that the network sees."""
        return self.train.mean if self.channels == 3 else (self.train.gray_mean,)

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise, the standard deviation."""
        return self.train.std if self.channels == 3 else (self.train.gray_std,)

    @property
    def left_out(self) -> list[str]:
        """A line for each split that lacks pictures since they could not be decoded."""
        splits = {"train": self.train} | ({"test": self.evaluation} if self.evaluation_split == "test" else {})
        return [
            f"left out of {name}, since they cannot be decoded: {len(beton.skipped)}; `dtrain data inspect` lists them"
            for name, beton in splits.items()
            if beton.skipped
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON's types: what a resume must find again, and `load_network` needs."""
        return {
            "class_names": list(self.train.class_names),
            "channels": self.channels,
            "image_size": self.image_size,
            "train_size": len(self.train_samples),
            "data": self.digest,
        }

    def train_loader(
        self, config: TrainConfig, plan: Plan, rank: int, dtype: torch.dtype, device: torch.device
    ) -> Loader:
        """Batches of process `rank` by step, augmented. Close it."""

        def request_at(step: int) -> Request | None:
            if step >= plan.total_steps:
                return None
            now = plan.at(step)
            return Request(self.train_samples[plan.batch(step)[now.shares[rank].positions]], now.epoch)

        augmentation = Augmentation.of(config)
        return self._open(config, self.train, request_at, augmentation, plan.largest_share, dtype, device)

    def chunks(
        self, config: TrainConfig, rank: int, world_size: int, dtype: torch.dtype, device: torch.device
    ) -> Chunks:
        """One pass over the evaluation split, cut into the same chunks for every world size. Close its loader."""
        samples, size = self.evaluation_samples, config.eval_batch_size

        def request_at(turn: int) -> Request | None:
            first = (turn * world_size + rank) * size
            return Request(samples[first : first + size], None) if first < len(samples) else None

        count = math.ceil(len(samples) / size)
        loader = self._open(config, self.evaluation, request_at, None, size, dtype, device)
        return Chunks(loader, rounds=math.ceil(count / world_size), mine=len(range(rank, count, world_size)))

    def _open(
        self,
        config: TrainConfig,
        beton: Beton,
        request_at: Callable[[int], Request | None],
        augmentation: Augmentation | None,
        largest: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Loader:
        return open_loader(
            beton,
            request_at,
            kind=config.loader,
            image_size=self.image_size,
            channels=self.channels,
            augmentation=augmentation,
            mean=config.mean or self.mean,
            std=config.std or self.std,
            dtype=dtype,
            device=device,
            largest=largest,
        )


@dataclass(frozen=True)
class Chunks:
    """A process's part of an evaluation: of the chunks of a split, process r of W takes r, r + W, ...

    Other chunk sizes give other roundings and can flip a tie, so the chunks do not depend on W. rounds: the most
    chunks that any process has; mine: how many this one has.
    """

    loader: Loader
    rounds: int
    mine: int

    def batch(self, turn: int) -> Batch | None:
        """The chunk of this round, None where this process has none left."""
        return self.loader.batch(turn) if turn < self.mine else None


def load_dataset(config: TrainConfig) -> Generator[Progress, None, DataSet]:
    """The data set of `config`, converted first where that is due; yields progress. Raises what `prepare` raises."""
    where, options = (config.data_dir, config.cache_dir), config.dataset_opt
    betons = yield from prepare(config.dataset, *where, config.conversion(), options=options)
    train, test = betons["train"], betons["test"]
    seen = (config.image_size.largest if config.image_size else train.image_size, _channels(config, train))
    if config.val_split is None:
        return DataSet(*seen, train, np.arange(len(train.labels)), test, np.arange(len(test.labels)), "test")
    held = stratified(train.labels, config.val_split, config.seed)
    return DataSet(*seen, train, np.flatnonzero(~held), train, np.flatnonzero(held), "val")


def _channels(config: TrainConfig, train: Beton) -> int:
    """One where nothing is lost by it and the architecture can be built for it, unless the user says otherwise."""
    if config.channels != "auto":
        return int(config.channels)
    gray = train.gray_images == len(train.labels)
    takes = gray and plugins.accepts(plugins.load(plugins.find("architecture", config.arch)), "in_channels")
    return 1 if takes else 3
