"""Networks that do what a plugin should not, on one process, after some steps."""

from __future__ import annotations

import os
import time

import torch
from small_network import small
from torch import Tensor, nn

STEP = 6  # training passes, those of the rehearsal included


class _Faulty(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = small(num_classes)
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes == STEP and os.environ.get("RANK", "1") == "1":
            self.fault()
        output: Tensor = self.network(images)
        return output

    def fault(self) -> None:
        raise NotImplementedError


class _Raises(_Faulty):
    def fault(self) -> None:
        raise ValueError("this network has had enough")


class _Sleeps(_Faulty):
    def fault(self) -> None:
        time.sleep(1000)


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
    return _Raises(num_classes)


def sleeps(num_classes: int) -> nn.Module:
    return _Sleeps(num_classes)


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
