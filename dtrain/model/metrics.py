"""Sums of a batch that add up to the same bits however a run is cut: int64 counts, and losses in units of 2^-20.

Legend: N images, K classes. A float sum over ranks and intervals differs with every way of cutting it; integers do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_UNIT = 2.0**-20  # a loss of 2.3 is 2,411,724 units; 2^63 of them are 8.8e12 images at loss 1
FIELDS = 6  # images, hits, hits among the first five, loss units, non-finite losses, checksum


def no_sums(device: torch.device) -> Tensor:
    """The sums of no image: int64 [6] of zeros on `device`."""
    return torch.zeros(FIELDS, dtype=torch.int64, device=device)


def sums_of(losses_N: Tensor, logits_NK: Tensor, labels: Tensor, *, top5: bool) -> Tensor:
    """Sums of one batch, to be added over batches and processes and divided once at the end.

    losses_N: (N,) float32; logits_NK: (N, K) any float type; labels: (N,) int64 in [0, K), or shares of the classes,
    (N, K) float32, of which the largest counts as right (at a tie each of them), and without `top5`.
    Returns (6,) int64 on the same device: images, top-1 hits, top-5 hits (0 unless `top5`), losses in units of 2^-20,
    the count of losses that are not finite, which add nothing to the sum, and 0 in the place of the batch's checksum.
    For K < 5 top-5 is top-K. No host sync.
    """
    finite_N = losses_N.isfinite()
    units = (torch.where(finite_N, losses_N, 0.0) / LOSS_UNIT).round().to(torch.int64).sum()
    first_N = logits_NK.argmax(1)
    mixed = labels.ndim == 2
    right_N = labels.gather(1, first_N[:, None])[:, 0] == labels.amax(1) if mixed else first_N == labels
    hits = right_N.sum()
    hits5 = torch.zeros_like(hits)
    if top5:
        best_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
        hits5 = (best_N5 == labels[:, None]).sum()
    images = torch.full_like(hits, labels.shape[0])
    return torch.stack((images, hits, hits5, units, (~finite_N).sum(), torch.zeros_like(hits)))


@dataclass(frozen=True)
class Sums:
    """Finished sums, on the host: what a row is made of."""

    images: int
    hits: int
    hits5: int
    loss_units: int
    nonfinite: int
    checksum: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Sums:
        """From the six integers of `sums_of`, summed over all processes."""
        return cls(*values)

    @property
    def loss(self) -> float:
        """Mean loss of an image."""
        return self.loss_units * LOSS_UNIT / max(1, self.images - self.nonfinite)

    @property
    def top1_fraction(self) -> float:
        """Share of images whose class came first, in [0, 1]."""
        return self.hits / max(1, self.images)
