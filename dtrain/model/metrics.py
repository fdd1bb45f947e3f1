"""Sums of losses and hits in int64, which are equal to the bit however a run is divided.

A float sum depends on the order in which it is added up, and so on the number of processes and on where a run was
stopped. Integers do not, so losses are added as multiples of 2^-20. Legend: N images, K classes.

sums_of   the sums of one batch, int64 [7] on the device
Outcome   one training step: its sums, its losses, and whether its update was skipped
Tally     the outcomes since they were last read, and which of them was the first to go wrong
Sums      the sums of all processes, read to the host
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.plan import Plan
from dtrain.world import World

LOSS_UNIT = 2.0**-20  # a loss of 2.3 is 2,411,724 units
# A larger loss counts as one that is not finite: the network diverged. The int64 of one interval holds all images of
# fewer than 2^23 where each has this loss, and of fewer than 2^42 at a mean loss of 2.
LARGEST_LOSS = 2.0**20
FIELDS = 7  # images, hits, hits among the first five, loss units, non-finite losses, skipped steps, checksum
SKIPPED, CHECKSUM = 5, 6
NEVER = 2**62


def no_sums(device: torch.device) -> Tensor:
    """Where adding up begins: int64 [7] of zeros on `device`."""
    return torch.zeros(FIELDS, dtype=torch.int64, device=device)


def is_countable(losses_N: Tensor) -> Tensor:
    """Which losses are finite and at most LARGEST_LOSS, bool [N]: sums count the others, and add nothing for them."""
    return losses_N.abs() <= LARGEST_LOSS  # NaN is not


def sums_of(losses_N: Tensor, logits_NK: Tensor, labels: Tensor, *, top5: bool) -> Tensor:
    """The sums of one batch, which are added over batches and processes, and divided once, at the end.

    losses_N: (N,) float32; logits_NK: (N, K) any float type; labels: (N,) int64 in [0, K), or shares of the classes,
    (N, K) float32, of which the largest counts as right (at a tie each of them), and without `top5`.
    Returns (7,) int64 on the same device: images, top-1 hits, top-5 hits (0 unless `top5`), losses in units of 2^-20,
    the count of losses that are not finite or larger than LARGEST_LOSS, which add nothing to the sum, and 0 in the
    places of the count of skipped steps and of the batch's checksum. For K < 5 top-5 is top-K. No host sync.
    """
    countable_N = is_countable(losses_N)
    units = (torch.where(countable_N, losses_N, 0.0) / LOSS_UNIT).round().to(torch.int64).sum()
    first_N = logits_NK.argmax(1)
    mixed = labels.ndim == 2
    right_N = labels.gather(1, first_N[:, None])[:, 0] == labels.amax(1) if mixed else first_N == labels
    hits = right_N.sum()
    hits5 = torch.zeros_like(hits)
    if top5:
        best_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
        hits5 = (best_N5 == labels[:, None]).sum()
    images = torch.full_like(hits, labels.shape[0])
    none = torch.zeros_like(hits)
    return torch.stack((images, hits, hits5, units, (~countable_N).sum(), none, none))


@dataclass(frozen=True)
class Outcome:
    """What a step came to on this process, on its device: sums int64 [7], losses float32 [N], skipped bool []."""

    sums: Tensor
    losses: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class Fault:
    """The first step that went wrong.

    step: how many updates were done after it, as rows count steps. positions: where in its global batch the images lie
    whose loss is not finite, in ascending order; none if only the gradient is not.
    """

    step: int
    positions: list[int]


class Tally:
    """The outcomes of this process's steps since they were last read. Adding one does not wait for the device.

    largest_share: the most images of this process in any step. streak: updates skipped in a row up to now, int64 [],
    which a read leaves alone; longest: the most since the last read.
    """

    def __init__(self, device: torch.device, largest_share: int, streak: int = 0) -> None:
        self.sums = no_sums(device)
        self.streak = torch.tensor(streak, device=device)
        self.longest = self.streak.clone()
        self._steps = 0
        self._first = torch.tensor(NEVER, device=device)  # which of these steps, from 0, was the first with a fault
        self._faulty_N = torch.zeros(largest_share, dtype=torch.bool, device=device)  # of that step's share

    def __iadd__(self, outcome: Outcome) -> Tally:
        self.sums += outcome.sums
        self.streak = torch.where(outcome.skipped, self.streak + 1, 0)
        self.longest = torch.maximum(self.longest, self.streak)
        faulty_N = ~is_countable(outcome.losses)
        is_first = (faulty_N.any() | outcome.skipped) & (self._first == NEVER)
        self._first = torch.where(is_first, self._steps, self._first)
        kept_N = self._faulty_N[: len(faulty_N)]
        torch.where(is_first, faulty_N, kept_N, out=kept_N)
        self._steps += 1
        return self

    def first_fault(self, world: World, plan: Plan, step: int) -> Fault:
        """The first fault on any process since the last read; call it after `step` updates, if there was a fault.

        plan: says where this process's share lay in the batch of that step. Collective, with a host sync.
        """
        mine = int(self._first)
        first = world.least(mine)
        faulty_step = step - self._steps + 1 + first
        now = plan.at(faulty_step - 1)
        marks = torch.zeros(now.batch_size, dtype=torch.int64)
        if mine == first:
            share = now.shares[world.rank]
            marks[share.positions] = self._faulty_N[: share.size].cpu().long()
        return Fault(faulty_step, [position for position, faulty in enumerate(world.total(marks)) if faulty])

    def begin_anew(self) -> None:
        """Forget what has been read, but for the streak."""
        self.sums.zero_()
        self.longest = self.streak.clone()
        self._first.fill_(NEVER)
        self._faulty_N.zero_()  # the next fault may be of a smaller share
        self._steps = 0


@dataclass(frozen=True)
class Sums:
    """Sums over all processes, read to the host: what a row of metrics.jsonl is computed from."""

    images: int
    hits: int
    hits5: int
    loss_units: int
    nonfinite: int
    skipped_steps: int
    checksum: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Sums:
        """From the seven integers of `sums_of`, summed over all processes."""
        return cls(*values)

    @property
    def loss(self) -> float:
        """The mean over the images whose loss was counted; NaN, which rows write as null, where there is none."""
        finite = self.images - self.nonfinite
        return self.loss_units * LOSS_UNIT / finite if finite else math.nan

    @property
    def top1_fraction(self) -> float:
        """Share of images whose class came first, in [0, 1]."""
        return self.hits / max(1, self.images)
