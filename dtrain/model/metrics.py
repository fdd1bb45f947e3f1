"""Sums of losses and hits in int64, which are the same to the bit for any number of processes and after any resume.

A sum of floats depends on the order of the additions, and so on the number of processes and on where a run was stopped.
A sum of integers does not, so losses are added up as multiples of 2^-20. Legend: N images, K classes.

sums_of   the sums of one batch, int64 [7] on the device
Outcome   the result of one training step: its sums, its losses, and whether its update was skipped
Tally     the outcomes since the last log point, added up, and the first step among them that went wrong
Sums      the sums over all processes, on the host
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
# A larger loss is treated like one that is not finite: the network has diverged. With this limit, the int64 sum of one
# log interval cannot overflow for fewer than 2^23 images, and at a mean loss of 2 for fewer than 2^42.
LARGEST_LOSS = 2.0**20
FIELDS = 7  # images, hits, hits among the first five, loss units, non-finite losses, skipped steps, checksum
SKIPPED, CHECKSUM = 5, 6
NEVER = 2**62  # the number of the first faulty step, while there is none


def no_sums(device: torch.device) -> Tensor:
    """Sums of no images: int64 [7] of zeros on `device`."""
    return torch.zeros(FIELDS, dtype=torch.int64, device=device)


def is_countable(losses_N: Tensor) -> Tensor:
    """Which losses are finite and at most LARGEST_LOSS, bool [N]. The others are counted, but not added to a sum."""
    return losses_N.abs() <= LARGEST_LOSS  # false for NaN


def sums_of(losses_N: Tensor, logits_NK: Tensor, labels: Tensor, *, top5: bool) -> Tensor:
    """The sums of one batch, to be added up over batches and processes, and divided only at the end.

    losses_N: (N,) float32; logits_NK: (N, K) any float type; labels: (N,) int64 in [0, K), or, for mixed images, the
    weights of the classes, (N, K) float32: the class of the largest weight is then the right one (at a tie each of
    them), and `top5` must be False.
    Returns (7,) int64 on the same device: images, top-1 hits, top-5 hits (0 unless `top5`), the sum of the losses in
    units of 2^-20, the number of losses that are not in it because they are not finite or larger than LARGEST_LOSS, and
    two zeros, in the places of the number of skipped steps and of the batch's checksum, which `train_step` fills in.
    For K < 5 top-5 is top-K. No host sync.
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
    """The result of one step on this process, on its device: sums int64 [7], losses float32 [N], skipped bool []."""

    sums: Tensor
    losses: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class Fault:
    """The first step that went wrong.

    step: its number, counted from 1, as in the rows of metrics.jsonl. positions: the positions in its global batch of
    the images whose loss is not finite, ascending; empty if only the gradient is not finite.
    """

    step: int
    positions: list[int]


class Tally:
    """The outcomes of this process's steps since `begin_anew`, added up. Adding one does not wait for the device.

    largest_share: the most images of this process in any step. streak: the number of updates skipped in a row up to
    now, int64 []; `begin_anew` does not reset it. longest: the longest such streak since `begin_anew`.
    """

    def __init__(self, device: torch.device, largest_share: int, streak: int = 0) -> None:
        self.sums = no_sums(device)
        self.streak = torch.tensor(streak, device=device)
        self.longest = self.streak.clone()
        self._steps = 0
        self._first = torch.tensor(NEVER, device=device)  # the first faulty step, counted from 0 since `begin_anew`
        self._faulty_N = torch.zeros(largest_share, dtype=torch.bool, device=device)  # which images of it are faulty

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
        """The first fault on any process since `begin_anew`. Call it only if there was one.

        step: the number of updates done so far. plan: tells which images of the batch were this process's share.
        Collective; with a host sync.
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
        """Reset everything but the streak."""
        self.sums.zero_()
        self.longest = self.streak.clone()
        self._first.fill_(NEVER)
        self._faulty_N.zero_()  # the next fault may be in a step with a smaller share, which overwrites only a part
        self._steps = 0


@dataclass(frozen=True)
class Sums:
    """Sums over all processes, on the host, from which a row of metrics.jsonl is computed."""

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
        """The mean over the images whose loss is finite; NaN, which is null in metrics.jsonl, if there are none."""
        finite = self.images - self.nonfinite
        return self.loss_units * LOSS_UNIT / finite if finite else math.nan

    @property
    def top1_fraction(self) -> float:
        """The top-1 accuracy as a fraction in [0, 1]."""
        return self.hits / max(1, self.images)
