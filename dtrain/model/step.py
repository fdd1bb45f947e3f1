"""The training step and the evaluation step: each takes a batch and returns tensors on the device.

There is no I/O, and no host sync but where a docstring says so. Legend: N images, C channels, H, W, K classes.
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
    """Options that are the same for all steps of a run.

    smoothing: label smoothing, in [0, 1). clip_grad: the norm to which larger gradients are scaled down; None for no
    clipping. skip_nonfinite: skip an update if a loss or a gradient is not finite on any process.
    """

    smoothing: float
    clip_grad: float | None
    skip_nonfinite: bool = False


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make the random numbers that a network draws in this step, as for dropout, depend on (seed, step, rank) alone.

    Seeds the generators of Python, of numpy, and those of torch for the CPU and for `device`, with the same result as
    `torch.manual_seed`. The micro-batches of the step draw one after the other. Takes some ten microseconds.
    """
    value = torch_seed(seed, Stream.DROPOUT, step, rank)
    # torch.manual_seed itself takes 0.1 ms longer: it records a traceback for each back end that is not installed
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)  # of the current device, which is this process's own
    np.random.seed(value % 2**32)  # noqa: NPY002 - networks that draw from numpy draw from this generator
    random.seed(value)


def loss_of(output: Tensor | tuple[Tensor, ...], labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each image, float32 [N], and the logits [N, K].

    output: logits, or a tuple of logits and auxiliary logits, whose losses are added with AUXILIARY_WEIGHT. labels:
    class numbers, int64 [N], or weights of the classes, float32 [N, K]. smoothing: applied to both kinds of labels.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    losses = [F.cross_entropy(o.float(), labels, reduction="none", label_smoothing=smoothing) for o in outputs]
    losses_N = losses[0]
    for auxiliary in losses[1:]:
        losses_N = losses_N + AUXILIARY_WEIGHT * auxiliary
    return losses_N, outputs[0]


def train_step(learner: Learner, batch: Batch, options: StepOptions, share: Share, epoch: int = 0) -> Outcome:
    """One update of the weights and then of the EMA, from this process's share of a batch, in micro-batches.

    epoch: the epoch of the step, 0-based; parameters that are frozen until a later one are not updated.
    Collective: gradients are averaged over processes in the last micro-batch's backward pass. No host sync, with one
    exception: under float16, unless the optimizer is fused, torch's loss scaler reads whether gradients overflowed.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    learner.frozen.hold(epoch)
    # the forward pass changes buffers, such as batch-norm statistics, before it is known whether the step is skipped
    buffers = Before(learner.network.module.buffers() if options.skip_nonfinite else ())
    sums, losses_N = backward(learner.network, learner.scaler, batch, options, share)
    skipped = update(learner, options, buffers, epoch)
    if share.first == 0:  # all processes skip the same update; only the first counts it, so that the sum is 1
        sums[SKIPPED] = skipped
    return Outcome(sums, losses_N, skipped)


def backward(
    network: Network, scaler: torch.amp.GradScaler, batch: Batch, options: StepOptions, share: Share
) -> tuple[Tensor, Tensor]:
    """Run the forward and backward passes of this process's share of a batch, one micro-batch after the other.

    batch: the images of `share`. The loss is the sum of their losses divided by `share.mean_over`, and multiplied by
    the loss scale; its gradient is added to the gradients that are there. The gradients of all processes are averaged
    in the backward pass of the last micro-batch.
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
            # equals losses_N.sum() / mean_over; written with the mean, since the divisor of equal micro-batches is then
            # exactly their number
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
    """Update the weights from their gradients, then the EMA. Returns whether the update was skipped, bool [] on device.

    epoch: the epoch of the step, 0-based; the gradients of what is frozen until a later one are dropped first. buffers:
    copies of the network's buffers from before the forward pass. With `skip_nonfinite`, if a gradient is not finite,
    `buffers` are restored and nothing else changes but the scale of the loss scaler. Raises UsageError if the optimizer
    does not allow that without waiting for the device; see `state_tensors`.
    """
    network = learner.network
    learner.frozen.drop_gradients(epoch)
    if not options.skip_nonfinite:
        _apply(learner, options.clip_grad)
        return torch.zeros((), dtype=torch.bool, device=network.device)
    skipped = gradients_not_finite(network.module)
    if network.device.type == "cpu" and not learner.scaler.is_enabled():  # on the CPU, `skipped` is read without a wait
        if not skipped:
            _apply(learner, options.clip_grad)
    else:
        apply_unless(skipped, learner, options.clip_grad)
    buffers.put_back(skipped)
    return skipped


def apply_unless(skipped: Tensor, learner: Learner, clip_grad: float | None) -> None:
    """Update as usual, then restore everything if `skipped` (bool [], on the device) is true, without a host sync.

    The exception, with a host sync, is the first update of a run, and that of parameters that were frozen until now:
    the optimizer then creates state, which has to be deleted again if the update is skipped. The EMA's count of updates
    is not restored, since it only matters whether it is 0. Costs a copy of weights, optimizer state and EMA.
    """
    network, optimizer, ema = learner.network, learner.optimizer, learner.ema
    averages = [*ema.module.parameters(), *ema.module.buffers()] if ema is not None else []
    weights, states = list(network.module.parameters()), state_tensors(optimizer, network.device)
    before, known = Before([*weights, *states, *averages]), set(optimizer.state)
    first_average = ema is not None and not ema.updates
    _apply(learner, clip_grad)
    before.put_back(skipped)
    state_tensors(optimizer, network.device)  # raises UsageError if the first update has created state on the host
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
    """Evaluate `module` on one batch: the network's own module or its EMA, already in evaluation mode.

    Returns the batch's sums, int64 [7], and for each image whether its class has the largest logit, bool [N], both on
    the device. No collective, no host sync.
    """
    with _steady_kernels(), network.autocast():
        output = module(batch.images)
    losses_N, logits_NK = loss_of(output, batch.labels, 0.0)
    right_N = logits_NK.argmax(1) == batch.labels
    return sums_of(losses_N, logits_NK, batch.labels, top5=True), right_N
