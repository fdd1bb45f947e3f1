"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# the quintic of Jordan et al. 2024, which drives singular values to between 0.7 and 1.2 in five steps
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices_BMN: Tensor, steps: int) -> Tensor:
    """Nearly the nearest semi-orthogonal matrices, by Newton-Schulz. (B, M, N) to float32 (B, M, N).

    It is computed in bfloat16 where the device has that natively, as published, and in float32 where it has not.
    """
    x = matrices_BMN.to(torch.bfloat16 if has_bfloat16(matrices_BMN.device.type) else torch.float32)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


@cache
def has_bfloat16(device_type: str) -> bool:
    """Whether matrices are multiplied in bfloat16 by the processor or GPU itself; elsewhere it is emulated, slowly."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


class Muon(torch.optim.Optimizer):
    """SGD with momentum, except that in groups with `orthogonal` set the updates are made orthogonal first.

    Filters of convolutions are taken as matrices with one row for each output channel. One update of a filter w of
    shape (M, ...), N = numel / M: w -= lr * weight_decay * w, then
    w -= lr * sqrt(max(1, M / N)) * orthogonal(nesterov(momentum)). Filters of the same shape are computed together.
    State: one momentum buffer for each parameter, in its own strides. No host sync.
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
    lr: float = 0.02,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    aux_lr: float | None = None,
    aux_weight_decay: float = 0.0,
    ns_steps: int = 5,
) -> torch.optim.Optimizer:
    """Muon for filters; the classifier, embeddings, biases and norms take SGD with momentum at `aux_lr`.

    weight_decay: of the filters, times lr. aux_lr (default: lr) and aux_weight_decay: rate and decay of all that is not
    made orthogonal. A group whose rate or decay is not the run's, as by --head-lr, keeps its own; --layer-decay scales
    either rate.
    """
    groups = []
    for group in param_groups:
        rate, decay, scale = group.get("lr", lr), group.get("weight_decay", weight_decay), group.get("lr_scale", 1.0)
        aux_rate = (lr if aux_lr is None else aux_lr) * scale if rate == lr * scale else rate
        aux_decay = aux_weight_decay if decay == weight_decay and group.get("decays", True) else decay
        groups.append({**_members(group, filters=True), "orthogonal": True, "lr": rate, "weight_decay": decay})
        groups.append(
            {**_members(group, filters=False), "orthogonal": False, "lr": aux_rate, "weight_decay": aux_decay}
        )
    common = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
    return Muon([{**common, **group} for group in groups if group["params"]], {"lr": lr})


def _members(group: dict[str, Any], *, filters: bool) -> dict[str, Any]:
    """The group with its filters alone, or all else; without roles, what has two dimensions or more is a filter."""
    parameters = list(group["params"])
    roles = group.get("roles") or ["filter" if p.ndim >= 2 else "vector" for p in parameters]
    kept = [number for number, role in enumerate(roles) if (role == "filter") == filters]
    lists = {"params": parameters, "roles": roles, "param_names": group.get("param_names")}
    return {**group, **{key: [values[i] for i in kept] for key, values in lists.items() if values is not None}}
