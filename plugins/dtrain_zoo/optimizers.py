"""torch's own optimizers as plugins. Fused by default: one kernel updates all parameters of a group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

Groups = Iterable[dict[str, Any]]


def sgd(
    param_groups: Groups,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, Nesterov's by default. Weight decay is added to the gradient."""
    nesterov = nesterov and momentum > 0
    return torch.optim.SGD(
        param_groups, lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused
    )


def adam(
    param_groups: Groups,
    *,
    lr: float = 1e-3,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015). Weight decay is added to the gradient."""
    return torch.optim.Adam(param_groups, lr, (betas[0], betas[1]), eps, weight_decay, fused=fused)


def adamw(
    param_groups: Groups,
    *,
    lr: float = 1e-3,
    betas: tuple[float, ...] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): weight decay shrinks the weights directly and is no part of the gradient."""
    return torch.optim.AdamW(param_groups, lr, (betas[0], betas[1]), eps, weight_decay, fused=fused)
