"""One update from a batch, and the evaluation of one: tensors in, tensors on the device out; no I/O, no host sync.

Legend: N images, C channels, H, W, K classes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.data.batch import Batch
from dtrain.keyed import Stream, torch_seed
from dtrain.model.learner import Learner
from dtrain.model.metrics import CHECKSUM, SKIPPED, Outcome, sums_of
from dtrain.model.network import Network
from dtrain.model.nonfinite import Before, gradients_not_finite, poisoned, state_tensors
from dtrain.model.optimization import clip, zero_new_momentum
from dtrain.plan import Share

AUXILIARY_WEIGHT = 0.3  # of each auxiliary loss: Szegedy et al. 2015, "Going deeper with convolutions", section 5


@dataclass(frozen=True)
class StepOptions:
    """How every step of a run is computed.

    smoothing: label smoothing, in [0, 1). clip_grad: the largest norm that a gradient may have, None for any.
    skip_nonfinite: leave out an update whose loss or gradient is not finite on any process.
    """

    smoothing: float
    clip_grad: float | None
    skip_nonfinite: bool = False


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make all that a network may draw in this step (dropout and the like) a function of (seed, step, rank).

    Seeds the generators of numpy, of Python, and those of torch for the CPU and for `device`, with the values and so
    the draws of `torch.manual_seed`; micro-batches then draw in order. Some ten microseconds.
    """
    value = torch_seed(seed, Stream.DROPOUT, step, rank)
    # not torch.manual_seed: for each back end that is not there it notes a traceback, 0.1 ms in all
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)  # of the current device, which is this process's own
    np.random.seed(value % 2**32)  # noqa: NPY002 - networks that draw from numpy draw from this generator
    random.seed(value)


def loss_of(output: Tensor | tuple[Tensor, ...], labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """One loss an image, float32 [N], and the logits [N, K]; auxiliary logits of a tuple count AUXILIARY_WEIGHT.

    labels: classes, int64 [N], or shares of the classes, float32 [N, K]; either is smoothed.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    losses = [F.cross_entropy(o.float(), labels, reduction="none", label_smoothing=smoothing) for o in outputs]
    losses_N = losses[0]
    for auxiliary in losses[1:]:
        losses_N = losses_N + AUXILIARY_WEIGHT * auxiliary
    return losses_N, outputs[0]


def train_step(learner: Learner, batch: Batch, options: StepOptions, share: Share, epoch: int = 0) -> Outcome:
    """One update from this process's share of a batch, in micro-batches; then the EMA.

    epoch: the step's, 0-based; what is frozen until a later one is left alone.
    Collective: gradients are averaged over processes in the last micro-batch's backward pass, and unscaled before they
    are clipped. No host sync, but for torch's loss scaler: under float16 it reads whether gradients overflowed, unless
    the optimizer is fused.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    learner.frozen.hold(epoch)
    # the forward pass changes buffers, such as the statistics of batch norm, before it is known that a step is skipped
    buffers = Before(learner.network.module.buffers() if options.skip_nonfinite else ())
    sums, losses_N = backward(learner.network, learner.scaler, batch, options, share)
    skipped = update(learner, options, buffers, epoch)
    if share.first == 0:  # the update of all processes is one: it is counted by the first of them
        sums[SKIPPED] = skipped
    return Outcome(sums, losses_N, skipped)


def backward(
    network: Network, scaler: torch.amp.GradScaler, batch: Batch, options: StepOptions, share: Share
) -> tuple[Tensor, Tensor]:
    """Add the (scaled) gradient of a share of a batch to the gradients that are there.

    batch: the images of `share`. What is added is the gradient of the sum of their losses over `share.mean_over`,
    computed one micro-batch at a time; the processes' gradients are averaged in the last one's backward pass.
    Returns the share's sums with its checksum, int64 [7], and its losses, float32 [N], both on the device.
    """
    sizes = list(share.micro_batches)
    sums, losses = [], []
    parts = zip(sizes, torch.split(batch.images, sizes), torch.split(batch.labels, sizes), strict=True)
    for part, (size, images_NCHW, targets) in enumerate(parts, start=1):
        travels = contextlib.nullcontext() if part == len(sizes) else network.keep_gradients_local()
        with travels:
            with network.autocast():
                output = network.trained(images_NCHW)
            losses_N, logits_NK = loss_of(output, targets, options.smoothing)
            # the mean, and not the sum over mean_over: of equal micro-batches it is divided by their number, exactly
            loss = losses_N.mean() / (share.mean_over / size)
            if options.skip_nonfinite:
                loss = poisoned(loss, losses_N)
            torch.autograd.backward(scaler.scale(loss))
        losses.append(losses_N.detach())
        sums.append(sums_of(losses_N.detach(), logits_NK.detach(), targets, top5=False))
    total = torch.stack(sums).sum(0)
    total[CHECKSUM] += batch.checksum
    return total, torch.cat(losses)


def update(learner: Learner, options: StepOptions, buffers: Before, epoch: int = 0) -> Tensor:
    """Update the weights from their gradients, then the EMA. Returns whether that was left out: bool [], on the device.

    epoch: the step's, 0-based; the gradients of what is frozen until a later one are dropped first.

    With `skip_nonfinite`, where a gradient is not finite, nothing changes but the scale of the loss scaler, and
    `buffers` are put back. Raises UsageError where that cannot be done without waiting for the device.
    """
    network = learner.network
    learner.frozen.drop_gradients(epoch)
    if not options.skip_nonfinite:
        _apply(learner, options.clip_grad)
        return torch.zeros((), dtype=torch.bool, device=network.device)
    skipped = gradients_not_finite(network.module)
    if network.device.type == "cpu" and not learner.scaler.is_enabled():  # reading a value on the CPU costs no wait
        if not skipped:
            _apply(learner, options.clip_grad)
    else:
        apply_unless(skipped, learner, options.clip_grad)
    buffers.put_back(skipped)
    return skipped


def apply_unless(skipped: Tensor, learner: Learner, clip_grad: float | None) -> None:
    """Update as usual, then put everything back where `skipped` (bool [], on the device) is true, without reading it.

    The exception is what the optimizer has only just made, in a run's first update or in the first one of parameters
    that were frozen until now: it cannot be put back, so it has to go again, and there the device is waited for. The
    EMA's own count goes on; only whether it is 0 matters. Costs a copy of weights, optimizer state and EMA.
    """
    network, optimizer, ema = learner.network, learner.optimizer, learner.ema
    averages = [*ema.module.parameters(), *ema.module.buffers()] if ema is not None else []
    weights, states = list(network.module.parameters()), state_tensors(optimizer, network.device)
    before, known = Before([*weights, *states, *averages]), set(optimizer.state)
    first_average = ema is not None and not ema.updates
    _apply(learner, clip_grad)
    before.put_back(skipped)
    state_tensors(optimizer, network.device)  # refuses what the first update put on the host
    if (len(optimizer.state) > len(known) or first_average) and skipped:
        for parameter in set(optimizer.state) - known:
            del optimizer.state[parameter]
        if ema is not None and first_average:
            ema.updates = 0


def _apply(learner: Learner, clip_grad: float | None) -> None:
    module = learner.network.module
    if clip_grad is not None:
        learner.scaler.unscale_(learner.optimizer)
        clip(module, clip_grad)
    if learner.scaler.is_enabled():
        zero_new_momentum(learner.optimizer)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if learner.ema is not None:
        learner.ema.update()


@contextlib.contextmanager
def _steady_kernels() -> Iterator[None]:
    """cuDNN's kernels by rule inside, and not by timing them, so that counts do not change from run to run."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@torch.no_grad()
def eval_step(network: Network, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Evaluate `module`, the network's own or its EMA, which the caller has put into evaluation mode, on one batch.

    Returns the batch's sums, int64 [7], and for each image whether its class had the largest logit, bool [N], both on
    the device. No collective, no host sync.
    """
    with _steady_kernels(), network.autocast():
        output = module(batch.images)
    losses_N, logits_NK = loss_of(output, batch.labels, 0.0)
    right_N = logits_NK.argmax(1) == batch.labels
    return sums_of(losses_N, logits_NK, batch.labels, top5=True), right_N
