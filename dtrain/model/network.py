"""A plugin's network, made ready: keyed weights, memory layout, compilation, DDP; its tensors for checkpoints.

`module` is what was built: it is saved, evaluated and averaged. `trained` is the same weights, compiled and in DDP.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import plugins
from dtrain.config import TrainConfig
from dtrain.errors import PluginError, UsageError
from dtrain.keyed import Stream, torch_seed
from dtrain.runtime import Runtime
from dtrain.world import World

# torch 2.14 renames the argument; both mean "send rank 0's buffers before each forward pass"
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"


@dataclass
class Network:
    """What is trained, and how it is computed."""

    module: nn.Module
    trained: nn.Module
    dtype: torch.dtype
    device: torch.device

    def autocast(self) -> torch.autocast:
        """The region of one forward pass; never open over an update, which would leave it with stale casts."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def keep_gradients_local(self) -> AbstractContextManager[Any]:
        """For all micro-batches but the last: their gradients add up here and travel once."""
        if isinstance(self.trained, DistributedDataParallel):
            return self.trained.no_sync()
        return contextlib.nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as they stand (no copy)."""
        return {name: value for name, value in self.module.state_dict().items() if isinstance(value, Tensor)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the network's own, keeping each one's strides."""
        self.module.load_state_dict(dict(tensors))


def chosen_architecture(config: TrainConfig) -> tuple[plugins.Plugin, Callable[..., Any], dict[str, Any]]:
    """The plugin that `config` names, its function, and its options. Raises PluginError, UsageError for an option."""
    plugin = plugins.find("architecture", config.arch)
    function = plugins.load(plugin)
    return plugin, function, plugins.parse_options(function, config.arch_opt, what=f"architecture {config.arch}")


def build_module(config: TrainConfig, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The architecture's module with the weights that (seed, INIT) gives on every process. On the CPU, contiguous.

    Raises PluginError for anything the plugin raises, UsageError for options it does not take.
    """
    plugin, function, options = chosen_architecture(config)
    offered = {"in_channels": in_channels, "image_size": image_size}
    passed = {name: value for name, value in offered.items() if plugins.accepts(function, name)}
    torch.manual_seed(torch_seed(config.seed, Stream.INIT))
    try:
        module = function(num_classes, **passed, **options)
    except Exception as error:
        raise PluginError(
            f"architecture {config.arch} of {plugin.distribution} could not be built for {num_classes} classes and "
            f"{in_channels} x {image_size} x {image_size} images: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise PluginError(
            f"architecture {config.arch} of {plugin.distribution} returned {type(module).__name__}, "
            f"not a torch.nn.Module; see {inspect.getsourcefile(function) or plugin.value}"
        )
    return module


def wrap(module: nn.Module, config: TrainConfig, runtime: Runtime, world: World, *, moving_buffers: bool) -> Network:
    """Lay the module out, compile it if asked, and put DDP around it where there are other processes.

    moving_buffers: the training output depends on buffers, so DDP must send rank 0's at every step.
    """
    device = runtime.torch_device()
    if config.sync_bn:
        if device.type != "cuda":
            raise UsageError("--sync-bn needs CUDA: torch has no such layer for the CPU; leave it out")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # torch's
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    module = module.to(device).to(memory_format=layout)  # before DDP, which records strides for its buckets
    trained: nn.Module = module
    if config.compile:
        trained = torch.compile(module, dynamic=False)  # type: ignore[assignment]  # torch types it as a callable
    if world.size > 1:
        trained = DistributedDataParallel(
            trained,
            device_ids=[device] if device.type == "cuda" else None,
            **{_BUFFERS: moving_buffers},  # type: ignore[arg-type]  # one keyword, named by torch's version
            gradient_as_bucket_view=True,  # saves a copy of all gradients; 1.1x by wall clock on two gloo ranks
        )
    return Network(module, trained, runtime.dtype(), device)


def mode_told(module: nn.Module, arch: str) -> str | None:
    """A line of warning where an architecture returns its whole network in evaluation mode, else None.

    Modes are the builder's, module by module, and training keeps them: a frozen batch norm stays frozen.
    """
    if module.training:
        return None
    return (
        f"architecture {arch} returns its network in evaluation mode: batch norm and dropout stay frozen as they are; "
        "call .train() in the builder unless that is meant"
    )


class Average:
    """The exponential moving average (EMA) of a module's parameters and buffers.

    module: the averages, in a copy of the module that is in evaluation mode. updates: how many there were; the first
    copies, each later one moves what is floating by `1 - decay` of the way to its value now, and copies what counts.
    torch.optim.swa_utils computes the same, but reads its count from a tensor several times an update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval()
        self.updates = 0
        self._decay = decay
        self._parameters = list(zip(self.module.parameters(), module.parameters(), strict=True))
        # by owner and name: a network may put another tensor in the place of a buffer, not in that of a parameter
        found: dict[int, tuple[dict[str, Any], dict[str, Any], str]] = {}
        for mine, its in zip(self.module.modules(), module.modules(), strict=True):
            for name, buffer in its._buffers.items():
                found.setdefault(id(buffer), (mine._buffers, its._buffers, name))  # a buffer of two modules counts once
        self._buffers = list(found.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take in what the module's values are now. No host sync; one launch or two for all tensors together."""
        pairs: list[tuple[Any, Any]] = list(self._parameters)
        pairs += [(mine[name], its[name]) for mine, its, name in self._buffers if its[name] is not None]
        moved = [pair for pair in pairs if self.updates and pair[0].is_floating_point()]
        copied = [pair for pair in pairs if not self.updates or not pair[0].is_floating_point()]
        if moved:
            averages, currents = zip(*moved, strict=True)
            torch._foreach_lerp_(averages, currents, 1 - self._decay)
        if copied:
            averages, currents = zip(*copied, strict=True)
            torch._foreach_copy_(averages, currents)
        self.updates += 1
