"""Trial passes through the network before training, so that a mistake in it is reported at once, in one line.

The two passes in `rehearse`, through the wrapped network, are needed for another reason too. DistributedDataParallel
regroups gradients into other buckets after its first backward pass, and in other buckets they are added up in another
order. Without these passes, a resumed run on 3 or 4 processes would round differently from one that was never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dtrain.errors import PluginError
from dtrain.keyed import Stream, key, torch_seed
from dtrain.model.groups import head_of
from dtrain.model.network import Network
from dtrain.model.step import loss_of
from dtrain.runtime import is_out_of_memory
from dtrain.world import World

LARGEST = 1024  # pixels a side; larger images are not tried when the smallest size that works is looked for


def noise(
    seed: int, shape: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    """Random images for a trial pass: (N, C, H, W) in [-1, 1), in the given memory format, equal on every process."""
    count = int(np.prod(shape))
    values = key(seed, Stream.REHEARSAL, np.arange(count, dtype=np.uint64)) >> np.uint64(40)
    images = torch.from_numpy((values.astype(np.float32) / 2.0**23 - 1.0).reshape(shape))
    return images.to(dtype).contiguous(memory_format=memory_format)


def buffers_move_output(module: nn.Module, images_NCHW: Tensor, seed: int) -> bool:
    """Whether the output in training depends on buffers that training changes.

    If so, every process has to use rank 0's buffers, or the processes would train different networks. The output of
    batch norm in training does not depend on its running statistics; that of a layer that normalises by a running mean
    does. Buffers of modules in evaluation mode are ignored, since they do not change and so stay equal on all
    processes. Makes two forward passes with different buffers and compares them; the module is left as it was.
    """
    moving = {id(b) for each in module.modules() if each.training for b in each.buffers(recurse=False)}
    floats = {id(b) for b in module.buffers() if b.is_floating_point()} & moving
    if not floats:
        return False
    saved = [b.clone() for b in module.buffers()]
    outputs = []
    with torch.no_grad():
        for push in (0.0, 0.5):
            for buffer, value in zip(module.buffers(), saved, strict=True):
                buffer.copy_(value + push if id(buffer) in floats else value)
            torch.manual_seed(torch_seed(seed, Stream.REHEARSAL))
            output = module(images_NCHW)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        for buffer, value in zip(module.buffers(), saved, strict=True):
            buffer.copy_(value)
    return not torch.equal(outputs[0], outputs[1])


def first_output(module: nn.Module, images_NCHW: Tensor, arch: str, num_classes: int) -> tuple[str, ...]:
    """Make a first forward pass; raise PluginError unless it gives [N, num_classes] logits.

    Returns the names of the head's parameters, read from the autograd graph of this pass (`groups.head_of`). The
    module's modes are not changed. Buffers in the state dict are restored afterwards; others are not, since they may be
    caches that the network fills only once.
    """
    saved = {name: value.clone() for name, value in _saved_buffers(module).items()}
    size = f"{images_NCHW.shape[1]} x {images_NCHW.shape[2]} x {images_NCHW.shape[3]}"
    try:
        output = module(images_NCHW)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise PluginError(f"architecture {arch} fails on {size} images: {type(error).__name__}: {error}") from error
    logits = output[0] if isinstance(output, tuple) and output else output
    wanted = (images_NCHW.shape[0], num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise PluginError(f"architecture {arch} must return logits of shape {wanted} for {size} images, found {found}")
    with torch.no_grad():
        for name, buffer in _saved_buffers(module).items():
            buffer.copy_(saved[name])
    return head_of(module, output)


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def _unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name not in state}


@contextlib.contextmanager
def smallest_size_told(build: Callable[[int], nn.Module], channels: int, size: int) -> Iterator[None]:
    """If a PluginError inside of the `with` is caused by images that are too small, add the smallest size that works.

    build: returns the module for images with this side in pixels. Sizes are tried on torch's meta device, which
    computes shapes only, in some milliseconds for each size.
    """
    try:
        yield
    except PluginError as error:
        if (smallest := _smallest_size(build, channels, size)) is None:
            raise
        raise PluginError(
            f"{error}; the smallest square images that work are {smallest} x {smallest}: give larger ones"
        ) from error


def _smallest_size(build: Callable[[int], nn.Module], channels: int, size: int) -> int | None:
    def works(pixels: int) -> bool:
        try:
            with torch.device("meta"), torch.no_grad():
                build(pixels)(torch.empty(2, channels, pixels, pixels))
        except Exception:
            return False
        return True

    if works(size):  # the error is not about shapes
        return None
    fails, fits = size, 2 * size
    while not works(fits):
        fails, fits = fits, 2 * fits
        if fits > LARGEST:
            return None
    while fits - fails > 1:
        middle = (fails + fits) // 2
        fails, fits = (fails, middle) if works(middle) else (middle, fits)
    return fits


def rehearse(network: Network, images_NCHW: Tensor, arch: str, num_classes: int, world: World) -> None:
    """Make two forward and backward passes through the wrapped network; then restore its weights and buffers.

    images_NCHW: images of this process, with the size, data type and memory layout of its training images. Raises
    PluginError for a parameter that gets no gradient (DDP would wait for it forever), a state dict that cannot be
    loaded back, and a buffer that training changes but no checkpoint holds. Collective.
    """
    before = {name: value.detach().clone() for name, value in network.tensors().items()}
    labels_N = torch.arange(images_NCHW.shape[0], device=network.device) % num_classes
    unused = [] if world.size == 1 else _without_gradient(network, network.module, images_NCHW, labels_N)
    unsaved: dict[str, Tensor] = {}
    for _ in range(0 if unused else 2):
        # compared after the last pass: a cache that the network fills once is the same after both passes
        unsaved = _unsaved_buffers(network.module)
        network.module.zero_grad(set_to_none=True)
        unused = _without_gradient(network, network.trained, images_NCHW, labels_N)
    if unused:
        raise PluginError(
            f"architecture {arch}: parameter {unused[0]} gets no gradient ({len(unused)} in all), so it would never "
            "train; use it in forward, or set requires_grad=False"
        )
    for name, buffer in _unsaved_buffers(network.module).items():
        if name in unsaved and not torch.equal(buffer, unsaved[name]):
            raise PluginError(
                f"architecture {arch}: training changes the buffer {name}, which is registered with persistent=False "
                "and so in no checkpoint: no resume would be exact; register it without that"
            )
    network.module.zero_grad(set_to_none=True)
    try:
        network.load(before)
    except (RuntimeError, ValueError, KeyError) as error:
        raise PluginError(f"architecture {arch}: its state dict does not load back: {error}") from error


def _without_gradient(network: Network, module: nn.Module, images_NCHW: Tensor, labels_N: Tensor) -> list[str]:
    try:
        with network.autocast():
            output = module(images_NCHW)
        losses_N, _ = loss_of(output, labels_N, 0.0)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # batch norm's words
            raise
        count = len(images_NCHW)
        raise PluginError(
            f"the network fails in training on {count} image{'s' * (count > 1)} at a time: {error}; give a larger "
            "--batch-size, fewer processes or fewer --grad-accum-steps"
        ) from error
    torch.autograd.backward(losses_N.mean())
    return [n for n, p in network.module.named_parameters() if p.requires_grad and p.grad is None]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, to compare tensors between processes. Copies them to the host."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
