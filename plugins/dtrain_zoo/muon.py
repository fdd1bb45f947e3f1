"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# the quintic of Jordan et al. 2024, which drives singular values to between 0.7 and 1.2 in five steps
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices_BMN: Tensor, steps: int) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices, by Newton-Schulz in bfloat16. (B, M, N) to float32 (B, M, N)."""
    x = matrices_BMN.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal` set are filters and matrices, flattened to 2-D; the others take SGD with momentum.

    One update of a filter w of shape (M, ...), N = numel / M: w -= lr * weight_decay * w, then
    w -= lr * sqrt(max(1, M / N)) * orthogonal(nesterov(momentum)). Filters of one shape are computed together.
    State: one momentum buffer a parameter, in its own strides. No host sync.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """One update from the gradients as they are."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if not group["orthogonal"] and group["weight_decay"]:  # added to the gradient, as SGD does
                gradients = [p.grad.add(p, alpha=group["weight_decay"]) for p in parameters]
            else:
                gradients = [p.grad for p in parameters]
            updates = self._momentum(parameters, gradients, group)
            if group["orthogonal"]:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["weight_decay"])
                updates = _orthogonal(updates, group["ns_steps"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _momentum(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)  # keeps the parameter's strides
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        if not group["nesterov"]:
            return buffers
        return list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))


def _orthogonal(updates: list[Tensor], steps: int) -> list[Tensor]:
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, update in enumerate(updates):
        by_shape[update.shape].append(index)
    result = list(updates)
    for shape, indices in by_shape.items():
        rows = shape[0]
        stacked_BMN = torch.stack([updates[i].reshape(rows, -1) for i in indices])
        scale = max(1.0, rows / stacked_BMN.shape[2]) ** 0.5
        for i, matrix in zip(indices, orthogonalize(stacked_BMN, steps) * scale, strict=True):
            result[i] = matrix.view(shape)
    return result


def muon(
    param_groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    aux_lr: float | None = None,
    aux_weight_decay: float = 0.0,
    ns_steps: int = 5,
) -> torch.optim.Optimizer:
    """Muon for filters and matrices; the last of them (the classifier), biases and norms take SGD at `aux_lr`.

    aux_lr: default lr. weight_decay: of the orthogonal updates, times lr; aux_weight_decay: of the classifier.
    """
    parameters = [p for group in param_groups for p in group["params"]]
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    hidden, head = (matrices[:-1], matrices[-1:]) if len(matrices) > 1 else (matrices, [])
    common = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
    aux = {**common, "lr": lr if aux_lr is None else aux_lr, "orthogonal": False}
    groups: list[dict[str, Any]] = [
        {"params": hidden, **common, "lr": lr, "orthogonal": True, "weight_decay": weight_decay},
        {"params": head, **aux, "weight_decay": aux_weight_decay},
        {"params": vectors, **aux, "weight_decay": 0.0},
    ]
    return Muon([g for g in groups if g["params"]], {"lr": lr})
