"""Leaving out an update whose loss or gradient is not finite (`--on-nonfinite skip`).

All processes must decide alike. After their all-reduce the gradients are equal on all of them, and a loss that is not
finite on one process makes its gradient, and so that of all, not finite (`poisoned`). Each process therefore decides by
its gradients alone, and no message is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.model.metrics import LARGEST_LOSS, is_countable

GIVE_UP_STEPS = 20  # a run ends after so many skipped updates in a row: the cause is then not a single sample
NAMED = 5  # samples that an error line names


def poisoned(loss: Tensor, losses_N: Tensor) -> Tensor:
    """`loss`, or NaN if one of `losses_N` is not finite or too large to be counted.

    So that the gradient is not finite either: by itself an infinite loss may have a finite gradient.
    """
    faulty = ~is_countable(losses_N.detach()).all()
    return loss * torch.ones_like(loss.detach()).masked_fill(faulty, math.nan)


def gradients_not_finite(module: nn.Module) -> Tensor:
    """Whether any gradient of `module` is not finite: bool [] on its device. One pass over gradients, no host sync."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    # by the largest absolute value: a sum of squares may overflow though all gradients are finite
    return ~torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()


class Before:
    """Copies of tensors as they are now, which can be written back into them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._copies = [tensor.clone() for tensor in self._tensors]

    @torch.no_grad()
    def put_back(self, where: Tensor) -> None:
        """Write the copies back where `where` (bool [] on the device) is true. No host sync."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            torch.where(where, copy, tensor, out=tensor)


def state_tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """The tensors of an optimizer's state, all of them on `device`.

    What its groups hold is taken for hyper-parameters, which an update does not change. Raises UsageError for state on
    the host: it cannot be put back without waiting for the device.
    """
    found = []
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device == device:
                found.append(value)
            elif value is not None:
                raise UsageError(
                    f"--on-nonfinite skip: {type(optimizer).__name__} keeps {key!r} on the host, which cannot be taken "
                    "back without waiting for the device; give --opt-opt fused=true if it takes that, or "
                    "--on-nonfinite stop"
                )
    return found


def told(step: int, samples: Sequence[int]) -> str:
    """What went wrong first, for people. samples: those whose loss cannot be counted; none means: the gradient."""
    named = ", ".join(map(str, sorted(samples)[:NAMED]))
    more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    if not samples:
        return f"the gradient of step {step} is not finite"
    whose = f"training sample{'s' * (len(samples) > 1)} {named}{more}"
    return f"the loss of step {step} is not finite, or above {LARGEST_LOSS:.0f}, for {whose}"
