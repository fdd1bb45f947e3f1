"""Leaving out an update whose loss or gradient is not finite (`--on-nonfinite skip`).

All processes must make the same decision. Each decides by its gradients alone, which are equal on all processes after
the all-reduce. A loss that is not finite on one process is made to give gradients that are not finite (`poisoned`), and
these reach all processes. So no extra communication is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.model.metrics import LARGEST_LOSS, is_countable

GIVE_UP_STEPS = 20  # a run ends after so many skipped updates in a row: the cause is then not a single sample
NAMED = 5  # the most samples that an error message lists


def poisoned(loss: Tensor, losses_N: Tensor) -> Tensor:
    """`loss`, or NaN if one of `losses_N` is not finite or larger than LARGEST_LOSS.

    This makes the gradient not finite either; an infinite loss alone may have a finite gradient.
    """
    faulty = ~is_countable(losses_N.detach()).all()
    return loss * torch.ones_like(loss.detach()).masked_fill(faulty, math.nan)


def gradients_not_finite(module: nn.Module) -> Tensor:
    """Whether any gradient of `module` is not finite: bool [] on its device. One pass over gradients, no host sync."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    # the maximum norm, since the sum of squares may overflow even if all gradients are finite
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

    Values in the optimizer's groups are left out, since they are hyper-parameters, which an update does not change.
    Raises UsageError for state on the host: it cannot be put back without waiting for the device.
    """
    found = []
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device == device:
                found.append(value)
            elif value is not None:
                raise UsageError(
                    f"--on-nonfinite skip: {type(optimizer).__name__} keeps {key!r} on the host, where it cannot be "
                    "restored without waiting for the device; give --opt-opt fused=true if the optimizer has that "
                    "option, or --on-nonfinite stop"
                )
    return found


def told(step: int, samples: Sequence[int]) -> str:
    """A message about the first step that went wrong.

    samples: those whose loss is not finite or too large; if there are none, the gradient is not finite.
    """
    named = ", ".join(map(str, sorted(samples)[:NAMED]))
    more = f" and {len(samples) - NAMED} more" if len(samples) > NAMED else ""
    if not samples:
        return f"the gradient of step {step} is not finite"
    whose = f"training sample{'s' * (len(samples) > 1)} {named}{more}"
    return f"the loss of step {step} is not finite, or above {LARGEST_LOSS:.0f}, for {whose}"
