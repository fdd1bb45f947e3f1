"""A plugin's network, made ready: keyed weights, memory layout, compilation, DDP; its tensors for checkpoints.

`module` is what was built: it is saved, evaluated and averaged. `trained` is the same weights, compiled and in DDP.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


class _Average(AveragedModel):
    """torch's averaged model, updated without waiting for a GPU: torch sends it its count anew at every step."""

    def update_parameters(self, model: nn.Module) -> None:
        """The first time a copy; then the average of what is floating, and a copy of what counts. No host sync."""
        pairs = list(zip(_values(self.module), _values(model), strict=True))
        moving = [pair for pair in pairs if self.n_averaged and pair[0].is_floating_point()]
        for average, current in pairs:
            if not self.n_averaged or not average.is_floating_point():  # the count stays on the host
                average.copy_(current)
        if moving:
            averages, currents = map(list, zip(*moving, strict=True))
            self.multi_avg_fn(averages, currents, self.n_averaged)  # type: ignore[misc]  # given below
        self.n_averaged += 1


def _values(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]


def average_of(module: nn.Module, decay: float | None) -> AveragedModel | None:
    """The EMA of a module's parameters and buffers (torch.optim.swa_utils), or None."""
    if decay is None:
        return None
    function = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch's
    average = _Average(module, multi_avg_fn=function, use_buffers=True)
    return average.eval()
