"""What all contenders are given: the same images, augmentation, network, optimizer settings and number of steps."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

BATCH_SIZE, SHIFT = 128, 4  # images; pixels each way
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
WORKERS = 2  # one a core of the machine that the records come from; torch warns of more
LOG_EVERY = 50  # steps; Lightning's own default


@dataclass(frozen=True)
class Task:
    """One measurement. data: an .npz of `images` uint8 [N, 32, 32, 3], `labels` int64 [N], `mean`, `std` float [3].

    warmup, steps: steps before the clocks are read, and those that are timed. bf16: whether the tuned form computes in
    bfloat16, which is slower than float32 on a processor that lacks it.
    """

    data: str
    network: str
    tuned: bool
    bf16: bool
    warmup: int
    steps: int


def task_from_command_line() -> Task:
    """The task that the one argument describes, as JSON."""
    return Task(**json.loads(sys.argv[1]))


class Images(Dataset[tuple[Tensor, int]]):
    """The training images, in memory as torchvision's CIFAR10 has them.

    Handed out as PIL pictures, which is what CIFAR10 does; tuned: as uint8 tensors, which torchvision's documentation
    recommends for speed and which take half the time.
    """

    def __init__(self, task: Task) -> None:
        with np.load(task.data) as file:
            self.images, self.labels = file["images"], file["labels"]
            mean, std = file["mean"].tolist(), file["std"].tolist()
        self.tuned = task.tuned
        self.tensors_NCHW = torch.from_numpy(self.images).permute(0, 3, 1, 2).contiguous() if task.tuned else None
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=SHIFT),
                v2.RandomHorizontalFlip(),
                *([] if task.tuned else [v2.ToImage()]),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images[index]) if self.tensors_NCHW is None else self.tensors_NCHW[index]
        return self.transform(picture), int(self.labels[index])
