"""Muon, SGD with orthogonalised momentum matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

# coefficients of the quintic of Jordan et al. 2024, which brings singular values to between 0.7 and 1.2 in five steps
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices_BMN: Tensor, steps: int) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices, by Newton-Schulz iteration. (B, M, N) to float32 (B, M, N).

    Computed in bfloat16, as published, if the device supports that natively, else in float32.
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
    """Whether the processor or GPU multiplies matrices in bfloat16 natively; otherwise this is emulated, slowly."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


class Muon(torch.optim.Optimizer):
    """SGD with momentum, in which groups with `orthogonal` set have their updates orthogonalised.

    A convolution's weight is treated as a matrix with one row for each output channel. The update of a weight w of
    shape (M, ...), with N = numel / M, is: w -= lr * weight_decay * w, then
    w -= lr * sqrt(max(1, M / N)) * orthogonal(nesterov(momentum)). Weights of the same shape are computed together.
    State: one momentum buffer for each parameter, with the parameter's strides. No host sync.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Make one update from the current gradients."""
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
    """Muon for the hidden weights; the head, embeddings, biases and norms are updated by SGD with momentum.

    Hidden weights are the parameters with the role "filter": weights of convolutions and linear layers before the head.
    weight_decay: of the hidden weights; they shrink by lr * weight_decay in each update. aux_lr (default: lr) and
    aux_weight_decay: learning rate and weight decay of all other parameters. A group whose rate or decay differs from
    the run's, as the head's with --head-lr, keeps its own; --layer-decay scales both lr and aux_lr.
    """
    groups = []
    for group in param_groups:
        rate, decay, scale = group.get("lr", lr), group.get("weight_decay", weight_decay), group.get("lr_scale")
        own = scale is None and "lr" in group  # not derived from the rate of the run
        aux_rate = rate if own else (lr if aux_lr is None else aux_lr) * (1.0 if scale is None else scale)
        aux_decay = aux_weight_decay if decay == weight_decay and group.get("decays", True) else decay
        groups.append({**_members(group, filters=True), "orthogonal": True, "lr": rate, "weight_decay": decay})
        groups.append(
            {**_members(group, filters=False), "orthogonal": False, "lr": aux_rate, "weight_decay": aux_decay}
        )
    common = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
    return Muon([{**common, **group} for group in groups if group["params"]], {"lr": lr})


def _members(group: dict[str, Any], *, filters: bool) -> dict[str, Any]:
    """The group with its filters only, or with all other parameters only.

    A group without roles treats every parameter with two dimensions or more as a filter.
    """
    parameters = list(group["params"])
    roles = group.get("roles") or ["filter" if p.ndim >= 2 else "vector" for p in parameters]
    kept = [number for number, role in enumerate(roles) if (role == "filter") == filters]
    lists = {"params": parameters, "roles": roles, "param_names": group.get("param_names")}
    return {**group, **{key: [values[i] for i in kept] for key, values in lists.items() if values is not None}}
