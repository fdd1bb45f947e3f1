"""Ways to train one module on several processes: how it is wrapped, when gradients are averaged, what is saved.

Alone        a single process, without communication
Replicated   a copy on every process, whose gradients DistributedDataParallel (DDP) averages

To add a way, add a class with the same three methods, and a line to `way_for`.
"""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# torch 2.14 renames the argument; both mean "send rank 0's buffers before each forward pass"
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"


class Alone:
    """Training on a single process. Also the base class of the other ways."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that is called in training. It has the same parameters as `module`."""
        return module

    def keep_gradients_local(self, trained: nn.Module) -> AbstractContextManager[Any]:
        """The context for all micro-batches but the last: their gradients are added up without communication."""
        return contextlib.nullcontext()

    def gather(self, module: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers by name, complete on this process; the tensors themselves, not copies."""
        return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Replicated(Alone):
    """DistributedDataParallel on the default process group.

    moving_buffers: the output in training depends on buffers, so rank 0's buffers are sent before every forward pass.
    """

    device: torch.device
    moving_buffers: bool

    def wrap(self, module: nn.Module) -> nn.Module:
        """A DDP around `module`. Collective: rank 0's parameters and buffers are sent to the others."""
        return DistributedDataParallel(
            module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **{_BUFFERS: self.moving_buffers},  # type: ignore[arg-type]  # one keyword, named by torch's version
            gradient_as_bucket_view=True,  # avoids a copy of all gradients; steps are 1.1x as fast on two gloo ranks
        )

    def keep_gradients_local(self, trained: nn.Module) -> AbstractContextManager[Any]:
        """DDP's `no_sync`."""
        region: AbstractContextManager[Any] = trained.no_sync()  # type: ignore[operator]  # a Module's attribute
        return region


def way_for(world_size: int, device: torch.device, *, moving_buffers: bool) -> Alone:
    """The way to train on `world_size` processes."""
    return Alone() if world_size == 1 else Replicated(device, moving_buffers)
