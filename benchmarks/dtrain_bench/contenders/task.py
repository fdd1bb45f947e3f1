"""What all scripts have in common: images, augmentation, optimizer settings, and the task that they are given."""

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

BATCH_SIZE, SHIFT = 128, 4  # images; the largest shift in pixels, in each direction
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
WORKERS = 2  # one for each core of the machine that the records come from; torch warns if there are more
LOG_EVERY = 50  # steps; Lightning's own default


@dataclass(frozen=True)
class Task:
    """One measurement.

    data: path of an .npz file with `images` uint8 [N, 32, 32, 3], `labels` int64 [N], `mean` and `std` float [3].
    network: as `networks.build` takes it. tuned: the form, `tuned` or else `defaults`. bf16: whether to compute in
    bfloat16. warmup: steps before the timed ones. steps: steps that are timed.
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
    """The training images, held in memory as torchvision's CIFAR10 holds them, and augmented.

    The form `defaults` makes a PIL image of each, as CIFAR10 does. The form `tuned` uses uint8 tensors, which
    torchvision's documentation recommends for speed and which take half the time.
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
