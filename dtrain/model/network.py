"""Builds a plugin's network with its initial weights, and prepares it: memory layout, compilation, DDP. Also its EMA.

A prepared network has two modules with the same parameters. `module` is the one that the plugin built: it is saved,
evaluated and averaged. `trained` is called in training: it may be compiled, and wrapped in DistributedDataParallel.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dtrain import plugins
from dtrain.errors import PluginError, UsageError
from dtrain.keyed import Stream, torch_seed
from dtrain.model.parallel import Alone, way_for

ALONE = Alone()


@dataclass
class Network:
    """The network that is trained, ready to be called.

    module, trained: see above. dtype: the data type of autocast; float32 means no autocast. head: the names of the
    head's parameters (`groups.head_of`). way: how several processes train it together; see parallel.py.
    """

    module: nn.Module
    trained: nn.Module
    dtype: torch.dtype
    device: torch.device
    head: tuple[str, ...] = ()
    way: Alone = ALONE

    def autocast(self) -> torch.autocast:
        """The autocast context for one forward pass.

        Leave it before the update: autocast keeps copies of the weights in `dtype`, which would then be out of date.
        """
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def keep_gradients_local(self) -> AbstractContextManager[Any]:
        """The context for all micro-batches but the last: their gradients are added up without communication."""
        return self.way.keep_gradients_local(self.trained)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name; the tensors themselves, not copies."""
        return self.way.gather(self.module)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the network's own, keeping each one's strides. Raises RuntimeError where they differ."""
        self.module.load_state_dict(dict(tensors))


def chosen_architecture(
    arch: str, arch_opt: Mapping[str, str]
) -> tuple[plugins.Plugin, Callable[..., Any], dict[str, Any]]:
    """The plugin that `arch` names, its function, and the options in `arch_opt`, read from text.

    Raises PluginError if there is no such plugin or it cannot be imported, UsageError for an option that does not fit.
    """
    plugin = plugins.find("architecture", arch)
    function = plugins.load(plugin)
    return plugin, function, plugins.parse_options(function, arch_opt, what=f"architecture {arch}")


def build_module(
    arch: str, arch_opt: Mapping[str, str], *, seed: int, num_classes: int, in_channels: int, image_size: int
) -> nn.Module:
    """The architecture's module, with initial weights that depend on `seed` alone. On the CPU, contiguous.

    Raises PluginError for anything the plugin raises, UsageError for options it does not take.
    """
    plugin, function, options = chosen_architecture(arch, arch_opt)
    offered = {"in_channels": in_channels, "image_size": image_size}
    passed = {name: value for name, value in offered.items() if plugins.accepts(function, name)}
    torch.manual_seed(torch_seed(seed, Stream.INIT))
    try:
        module = function(num_classes, **passed, **options)
    except Exception as error:
        raise PluginError(
            f"architecture {arch} of {plugin.distribution} could not be built for {num_classes} classes and "
            f"{in_channels} x {image_size} x {image_size} images: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise PluginError(
            f"architecture {arch} of {plugin.distribution} returned {type(module).__name__}, "
            f"not a torch.nn.Module; see {inspect.getsourcefile(function) or plugin.value}"
        )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise PluginError(
                f"architecture {arch} of {plugin.distribution}: parameter {name} is lazy, and gets its size and values "
                "only from the first images; give its layer its size, for which image_size is passed"
            )
    return module


def mode_told(module: nn.Module, arch: str) -> str | None:
    """A warning if an architecture returns its whole network in evaluation mode, else None.

    Training keeps the mode of each module as the architecture's function set it, so that a frozen batch norm stays
    frozen. A network that is in evaluation mode by mistake would not update its batch-norm statistics, nor use dropout.
    """
    if module.training:
        return None
    return (
        f"architecture {arch} returns its network in evaluation mode, which training keeps: batch-norm statistics are "
        "not updated and dropout is off; call .train() in its function unless that is intended"
    )


def layout(channels_last: bool) -> torch.memory_format:
    """The memory layout of images and filters: channels-last (NHWC in memory) or contiguous (NCHW)."""
    return torch.channels_last if channels_last else torch.contiguous_format


def wrap(
    module: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool = True,
    sync_bn: bool = False,
    compiled: bool = False,
    world_size: int = 1,
    moving_buffers: bool = False,
    head: tuple[str, ...] = (),
) -> Network:
    """Move the module to its device and layout, make it ready for `world_size` processes, and compile it if asked.

    sync_bn: compute batch-norm statistics over all processes. moving_buffers: the output in training depends on
    buffers, so rank 0's buffers are sent to all processes at every step. Raises UsageError for sync_bn without CUDA.
    Collective if there is more than one process.
    """
    if sync_bn:
        if device.type != "cuda":
            raise UsageError("--sync-bn needs CUDA: torch has no such layer for the CPU; leave it out")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # torch's
    module = module.to(device).to(memory_format=layout(channels_last))  # before DDP, which records strides
    way = way_for(world_size, device, moving_buffers=moving_buffers)
    # compiled inside of DDP: in both orders torch splits the graph at DDP's buckets, but in the other order it does not
    # compile a network that is an nn.Sequential (torch 2.14)
    inner: nn.Module = torch.compile(module, dynamic=False) if compiled else module  # type: ignore[assignment]
    return Network(module, way.wrap(inner), dtype, device, head, way)


class Average:
    """The exponential moving average (EMA) of a module's parameters and buffers.

    module: the averages, in a copy of the module that is in evaluation mode. updates: the number of updates so far. The
    first one copies all values. Each later one moves floating-point values by the fraction `1 - decay` towards their
    current value, and copies integers, such as counts of batches.
    torch.optim.swa_utils computes the same, but reads its count from a tensor several times in each update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval()
        self.updates = 0
        self._decay = decay
        self._parameters = list(zip(self.module.parameters(), module.parameters(), strict=True))
        # by owner and name, since a network may replace a buffer by another tensor; parameters are never replaced
        found: dict[int, tuple[dict[str, Any], dict[str, Any], str]] = {}
        for mine, its in zip(self.module.modules(), module.modules(), strict=True):
            for name, buffer in its._buffers.items():
                # a buffer that two modules share is averaged once
                found.setdefault(id(buffer), (mine._buffers, its._buffers, name))
        self._buffers = list(found.values())

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages from the module's current values. No host sync; one or two kernels for all tensors."""
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
