"""Networks that do what a plugin should not, on one process, after some steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from small_network import small
from torch import Tensor, nn

STEP = 6  # training passes, those of the rehearsal included


class _Faulty(nn.Module):
    """Does `fault` in one training pass of process 1, or of the only one."""

    def __init__(self, num_classes: int, fault: Callable[[], object]) -> None:
        super().__init__()
        self.network = small(num_classes)
        self.passes, self.fault = 0, fault

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes == STEP and os.environ.get("RANK", "1") == "1":
            self.fault()
        output: Tensor = self.network(images)
        return output


def _raise() -> None:
    raise ValueError("this network has had enough")


class _Forgets(nn.Module):
    """Draws from a generator that nobody seeds and no checkpoint holds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = small(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        noise = int.from_bytes(os.urandom(2), "little") / 2**16 if self.training else 0.0
        output: Tensor = self.network(images + noise)
        return output


def raises(num_classes: int) -> nn.Module:
    return _Faulty(num_classes, _raise)


def sleeps(num_classes: int) -> nn.Module:
    return _Faulty(num_classes, lambda: time.sleep(1000))


def forgets(num_classes: int) -> nn.Module:
    return _Forgets(num_classes)


def wrong_logits(num_classes: int) -> nn.Module:
    return small(num_classes + 1)


def unused_parameter(num_classes: int) -> nn.Module:
    network = small(num_classes)
    network.register_parameter("nobody_asks_me", nn.Parameter(torch.zeros(3)))
    return network


def other_weights_on_each_process(num_classes: int) -> nn.Module:
    torch.manual_seed(os.getpid())
    return small(num_classes)


class _Bright(nn.Module):
    """Has no number for an image whose mean, normalised, is above `limit`, nor, with batch norm, for its neighbours."""

    def __init__(self, num_classes: int, limit: float, alone: bool) -> None:
        super().__init__()
        self.network = small(num_classes)
        self.limit, self.alone = limit, alone

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) > (self.limit if self.training else torch.inf)
        if self.alone:
            return self.network(images) * torch.where(bright[:, None], torch.nan, 1.0)  # type: ignore[no-any-return]
        output: Tensor = self.network(images.masked_fill(bright[:, None, None, None], torch.inf))
        return output


def bright(num_classes: int, *, limit: float = 0.3, alone: bool = False) -> nn.Module:
    return _Bright(num_classes, limit, alone)


class _HungryForMany(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = small(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 64:
            torch.empty(1 << 50)
        output: Tensor = self.network(images)
        return output


class _Fades(nn.Module):
    """Knows nothing any more after 60 training passes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = small(num_classes)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        output: Tensor = self.network(images)
        return output if self.training else output * (self.passes < 60)


class _Counts(nn.Module):
    """Keeps a buffer out of its state dict; `goes_on`: and changes it in each pass, not only in the first."""

    def __init__(self, num_classes: int, goes_on: bool) -> None:
        super().__init__()
        self.network = small(num_classes)
        self.goes_on = goes_on
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and (self.goes_on or not self.seen):
            self.seen += 1
        output: Tensor = self.network(images) * self.seen.clamp(1, 2)
        return output


def hungry(num_classes: int) -> nn.Module:
    return _Faulty(num_classes, lambda: torch.empty(1 << 50))


def counts(num_classes: int, *, goes_on: bool = True) -> nn.Module:
    return _Counts(num_classes, goes_on)


def large_images_only(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def slow_to_build(num_classes: int) -> nn.Module:
    print("building", flush=True)
    time.sleep(60)
    return small(num_classes)


def hungry_for_many(num_classes: int) -> nn.Module:
    return _HungryForMany(num_classes)


def fades(num_classes: int) -> nn.Module:
    return _Fades(num_classes)


def needs_two_images(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Batch norm of one value for each channel and image."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(in_channels), nn.Linear(in_channels, num_classes)
    )


def lazy(num_classes: int) -> nn.Module:
    """A layer that learns its size from the first images."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
