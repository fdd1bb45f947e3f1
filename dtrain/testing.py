"""Checks for authors of plugins (plugins/README.md). They need no test framework and can be called from any.

Each function returns nothing if the plugin is sound. Otherwise it raises an error of one line: PluginError or DataError
if the trainer would refuse the plugin too, AssertionError if runs with it would give wrong results or could not be
resumed exactly. Each takes some tenths of a second on a CPU, except `check_dataset`, which reads all pictures twice.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import plugins
from dtrain.data.sources import digest_of as source_digest_of
from dtrain.data.sources import open_source, place_of
from dtrain.errors import PluginError
from dtrain.keyed import Stream, torch_seed
from dtrain.model.groups import grouped
from dtrain.model.optimization import Choice, Packed, build_optimizer, pack, set_lr, unpack
from dtrain.model.rehearsal import digest_of, first_output, noise
from dtrain.model.step import loss_of
from dtrain.schedules import GIVE, is_factor
from dtrain.settings.data import Conversion


def check_architecture(
    architecture: str | Callable[..., Any],
    *,
    image_size: int = 32,
    num_classes: int = 10,
    in_channels: int = 3,
    **options: Any,
) -> None:
    """Check an architecture on square images.

    architecture: its name or the function itself. options: its options, in their own types and not as text.
    It checks that logits have the shape [b, num_classes], that equal seeds give equal weights, that every parameter
    gets a gradient, and that another instance gives the same logits after it has loaded the state dict.
    """
    name, function = _loaded("architecture", architecture)
    images = noise(0, (2, in_channels, image_size, image_size), torch.float32, torch.channels_last)
    offered = {"in_channels": in_channels, "image_size": image_size}
    passed = {key: value for key, value in offered.items() if plugins.accepts(function, key)}

    def built(seed: int) -> nn.Module:
        torch.manual_seed(torch_seed(seed, Stream.INIT))
        module = function(num_classes, **passed, **options)
        if not isinstance(module, nn.Module):
            raise PluginError(f"architecture {name} returns a {type(module).__name__}, not a torch.nn.Module")
        return module

    with torch.random.fork_rng(devices=[]):
        module, twin, other = built(0), built(0), built(1)
        _hold(
            digest_of(_tensors(module)) == digest_of(_tensors(twin)),
            f"architecture {name} gets different weights from the same seed; draw them from torch's generator alone",
        )
        first_output(module, images, name, num_classes)
        losses_N, _ = loss_of(module(images), torch.arange(2) % num_classes, 0.0)
        torch.autograd.backward(losses_N.mean())
        for parameter, value in module.named_parameters():
            if value.requires_grad:
                _hold(value.grad is not None, f"architecture {name}: parameter {parameter} gets no gradient")
        try:
            other.load_state_dict(_tensors(module))
        except RuntimeError as error:
            raise AssertionError(f"architecture {name}: its state dict does not load back: {error}") from None
        with torch.no_grad():
            same = torch.equal(_logits(module.eval()(images)), _logits(other.eval()(images)))
        _hold(
            same,
            f"architecture {name} gives different logits when its state dict is loaded into a new instance; register "
            "all that it learns as parameters or buffers",
        )


def check_optimizer(optimizer: str | Callable[..., Any], *, lr: float = 0.01, **options: Any) -> None:
    """Check an optimizer on a network of a convolution, a batch norm and a classifier.

    optimizer: its name or the function itself. options: its options, in their own types and not as text.
    It checks that the optimizer holds every parameter that it is given, that it changes each of them to finite values,
    that it changes nothing at a learning rate of 0 (otherwise it ignores the schedule), and that it continues bit for
    bit from its saved state.
    """
    name, function = _loaded("optimizer", optimizer)
    images, labels = noise(0, (8, 3, 8, 8), torch.float32, torch.channels_last), torch.arange(8) % 4

    def built(module: nn.Module) -> torch.optim.Optimizer:
        groups = grouped(module, lr=lr, head=("4.weight", "4.bias"))
        return build_optimizer(Choice(name, "this package", function, options, lr), groups, module)

    def step(module: nn.Module, made: torch.optim.Optimizer, factor: float) -> None:
        set_lr(made, factor)
        made.zero_grad(set_to_none=True)
        losses_N, _ = loss_of(module(images), labels, 0.0)
        torch.autograd.backward(losses_N.mean())
        made.step()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(0, Stream.INIT))
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
        )
        made = built(module)
        before = {key: value.detach().clone() for key, value in module.named_parameters()}
        step(module, made, 0.0)
        for key, value in module.named_parameters():
            _hold(torch.equal(value, before[key]), f"optimizer {name} changes weights at lr 0: it ignores the schedule")
        for _ in range(2):
            step(module, made, 1.0)
        for key, value in module.named_parameters():
            _hold(not torch.equal(value, before[key]), f"optimizer {name} does not change {_KINDS[value.ndim >= 2]}")
            _hold(bool(value.isfinite().all()), f"optimizer {name} makes weights that are not finite")
        twin = copy.deepcopy(module)
        again = built(twin)
        unpack(again, twin, _through_a_file(name, pack(made, module)))
        for one, its in ((module, made), (twin, again)):
            step(one, its, 0.5)
        _hold(
            digest_of(_tensors(module)) == digest_of(_tensors(twin)),
            f"optimizer {name} does not continue bit for bit from its saved state; keep all of it in optimizer.state",
        )


def check_schedule(schedule: str | Callable[..., Any], **options: Any) -> None:
    """Check a schedule, by name or as the function itself, over runs of several lengths.

    It checks that the factors are finite and not negative, and that they do not depend on the order of the calls.
    """
    name, function = _loaded("schedule", schedule)
    for total in (7, 1_000, 50_000_000):
        points = sorted({total * k // 100 for k in range(100)})
        forward = [function(seen, total, **options) for seen in points]
        backward = [function(seen, total, **options) for seen in reversed(points)]
        for seen, value in zip(points, forward, strict=True):
            if not is_factor(value):
                raise PluginError(f"schedule {name} gives {value!r} after {seen} of {total} samples; {GIVE}")
        _hold(
            forward == backward[::-1],
            f"schedule {name} gives other factors when it is called in another order, so no resume would be exact",
        )


def check_dataset(dataset: str | Callable[..., Any], data_dir: Path | str = "data", **options: Any) -> None:
    """Check a data set, by name or as the function itself.

    It checks that the pictures can be read, and that the digest and the pictures are the same each time. It reads all
    pictures twice.
    """
    name, function = _loaded("dataset", dataset)
    here = plugins.Plugin("dataset", name, "this process", plugins.UNKNOWN, name)
    plugin = plugins.find("dataset", dataset) if isinstance(dataset, str) else here
    place, again = (place_of(plugin, function, Path(data_dir), options) for _ in range(2))
    digest = source_digest_of(place)
    _hold(digest == source_digest_of(again), f"data set {name} has a different digest each time: every run converts it")
    for part, split in open_source(place, Conversion(), digest).splits.items():
        first, second = ([hashlib.sha256(decode().tobytes()).digest() for decode in split.pictures()] for _ in range(2))
        _hold(first == second, f"data set {name}: {part} has different pictures each time, but its digest is the same")


_KINDS = {True: "matrices and filters", False: "biases and norms"}


def _loaded(kind: plugins.Kind, plugin: str | Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    if isinstance(plugin, str):
        return plugin, plugins.load(plugins.find(kind, plugin))
    return getattr(plugin, "__name__", type(plugin).__name__), plugin


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, which a checkpoint would hold."""
    return {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def _logits(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple) else output
    return logits


def _through_a_file(name: str, packed: Packed) -> Packed:
    """An optimizer's state as a checkpoint would give it back: copies of the tensors, and the rest through JSON."""
    try:
        scalars = json.loads(json.dumps(packed.scalars))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"optimizer {name} keeps state that is neither a tensor nor a number: {error}") from None
    return Packed({key: value.clone() for key, value in packed.tensors.items()}, scalars)


def _hold(claim: bool, otherwise: str) -> None:
    if not claim:
        raise AssertionError(otherwise)
