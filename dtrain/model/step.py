"""One update and one evaluation of a batch: tensors in, device tensors out. No I/O, no host sync.

Legend: N images, C channels, H, W, K classes.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from dtrain.data.loader import Batch
from dtrain.keyed import Stream, torch_seed
from dtrain.model.metrics import sums_of
from dtrain.model.network import Network

AUXILIARY_WEIGHT = 0.3  # of each auxiliary loss: Szegedy et al. 2015, "Going deeper with convolutions", section 5


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed: images of a micro-batch, label smoothing in [0, 1), largest gradient norm."""

    micro_batch: int
    smoothing: float
    clip_grad: float | None


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make all that a network may draw in this step (dropout and the like) a function of (seed, step, rank).

    Sets torch's, numpy's and Python's generators; micro-batches then draw in order. Tens of microseconds.
    """
    value = torch_seed(seed, Stream.DROPOUT, step, rank)
    torch.manual_seed(value)
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


def train_step(
    network: Network,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: AveragedModel | None,
    batch: Batch,
    options: StepOptions,
) -> Tensor:
    """One update from this process's share of a batch, in micro-batches; then the EMA.

    Returns the sums of the share with its checksum, int64 [6] on the device (metrics.sums_of). Collective: gradients
    are averaged over processes in the last micro-batch's backward pass, and unscaled before they are clipped.
    """
    optimizer.zero_grad(set_to_none=True)
    images, labels = torch.split(batch.images, options.micro_batch), torch.split(batch.labels, options.micro_batch)
    sums = []
    for part, (images_NCHW, targets) in enumerate(zip(images, labels, strict=True), start=1):
        travels = contextlib.nullcontext() if part == len(images) else network.keep_gradients_local()
        with travels:
            with network.autocast():
                output = network.trained(images_NCHW)
            losses_N, logits_NK = loss_of(output, targets, options.smoothing)
            torch.autograd.backward(scaler.scale(losses_N.mean() / len(images)))
        sums.append(sums_of(losses_N.detach(), logits_NK.detach(), targets, top5=False))
    if options.clip_grad is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.module.parameters(), options.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    if ema is not None:
        ema.update_parameters(network.module)
    total = torch.stack(sums).sum(0)
    total[-1] += batch.checksum
    return total


@torch.no_grad()
def eval_step(network: Network, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sums of a batch under `module` (the network's own or its EMA), which is in evaluation mode, int64 [6].

    And for each image whether its class came first, bool [N]. No collective, no host sync.
    """
    with network.autocast():
        output = module(batch.images)
    losses_N, logits_NK = loss_of(output, batch.labels, 0.0)
    right_N = logits_NK.argmax(1) == batch.labels
    return sums_of(losses_N, logits_NK, batch.labels, top5=True), right_N
