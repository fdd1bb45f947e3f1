"""The optimizer: which one is used and how it is built, gradient clipping, and its state as named tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import plugins
from dtrain.errors import PluginError, StorageError, UsageError
from dtrain.model.groups import Group
from dtrain.settings.optimization import Optimization
from dtrain.settings.values import flag_of

# The keys of a group that describe the network or how this machine computes. They do not affect the results, so they
# are not saved, and a resume keeps those of the new optimizer.
OWN_KEYS = (
    *("params", "param_names", "roles", "name", "decays", "lr_scale", "frozen_until"),
    *("fused", "foreach", "capturable", "differentiable"),
)
TINY = 2.0**-100  # a gradient times this is a finite float32, and so is the norm of 2^50 of them


@dataclass(frozen=True)
class Choice:
    """The optimizer that the settings choose: the function of its plugin, and the options to call it with.

    distribution: the package that it comes from, for error messages. lr: the peak learning rate.
    """

    name: str
    distribution: str
    function: Callable[..., Any]
    options: dict[str, Any]
    lr: float

    @property
    def said(self) -> str:
        """Its name and distribution, for errors."""
        return f"optimizer {self.name} of {self.distribution}"

    @property
    def weight_decay(self) -> float | None:
        """The weight decay, from the options or the function's default; None if the function has no such parameter."""
        decay: float | None = self.options.get("weight_decay", plugins.default_of(self.function, "weight_decay"))
        return decay


def chosen_optimizer(asked: Optimization, by_hand: Collection[str] = ()) -> Choice:
    """The optimizer that the settings name, with its options converted from text, and its peak learning rate.

    momentum, nesterov and weight_decay are passed on if the plugin's function has such parameters. by_hand: the
    settings that were given as flags; if the function cannot take one of these it is an error, while one from a recipe
    is ignored. The learning rate is `lr`, or else the default of the function. Raises PluginError; UsageError for an
    option or a flag that the function cannot take, and if there is no learning rate.
    """
    plugin = plugins.find("optimizer", asked.opt)
    function = plugins.load(plugin)
    options = plugins.parse_options(function, asked.opt_opt, what=f"optimizer {asked.opt}")
    given = {"momentum": asked.momentum, "nesterov": asked.nesterov, "weight_decay": asked.weight_decay}
    for name, value in given.items():
        if value is None:
            continue
        if plugins.accepts(function, name):
            options.setdefault(name, value)
        elif name in by_hand:
            raise UsageError(f"{flag_of(name)}: optimizer {asked.opt} has no use for it; leave it out")
    lr = asked.lr if asked.lr is not None else plugins.default_of(function, "lr")
    if lr is None:
        raise UsageError(f"optimizer {asked.opt} has no learning rate of its own; give one with --lr")
    return Choice(asked.opt, plugin.distribution, function, options, lr)


def build_optimizer(choice: Choice, groups: Sequence[Group], module: nn.Module) -> torch.optim.Optimizer:
    """The plugin's optimizer over `groups` of the parameters of `module`.

    Each group is a dict as plugins/README.md describes it. Afterwards each group of the optimizer has an `initial_lr`,
    the rate that the schedule's factor multiplies. Raises PluginError for what the plugin raises.
    """
    parameters, decay = dict(module.named_parameters()), choice.weight_decay
    given: list[dict[str, Any]] = []
    for group in groups:
        given.append(
            {
                "params": [parameters[name] for name in group.params],
                "param_names": list(group.params),
                "roles": list(group.roles),
                "name": group.name,
                "decays": group.decays,
                "lr": group.lr,
                "lr_scale": group.lr_scale,
                "frozen_until": group.frozen_until,
            }
        )
        if decay is not None:
            given[-1]["weight_decay"] = decay if group.decays else 0.0
    try:
        optimizer = choice.function(given, lr=choice.lr, **choice.options)
    except Exception as error:
        raise PluginError(f"{choice.said} could not be built: {type(error).__name__}: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PluginError(f"{choice.said} returns a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    _refuse_what_was_ignored(choice, optimizer, groups, parameters)
    for made in optimizer.param_groups:
        made["initial_lr"] = made["lr"]
    return optimizer


def _refuse_what_was_ignored(
    choice: Choice, optimizer: torch.optim.Optimizer, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raise PluginError if the optimizer lacks a parameter that it was given, or gives one rate to all groups."""
    rates = {id(p): made["lr"] for made in optimizer.param_groups for p in made["params"]}
    names = [name for group in groups for name in group.params]
    if lacking := [name for name in names if id(parameters[name]) not in rates]:
        raise PluginError(
            f"{choice.said} leaves out the parameter {lacking[0]} ({len(lacking)} in all), so it would never train; it "
            "has to take all of its groups"
        )
    if len({group.lr for group in groups}) > 1 and len(set(rates.values())) == 1:
        raise PluginError(
            f"{choice.said} gives one rate to all parameters, so --layer-decay and --head-lr would have no effect; "
            "leave them out, or choose an optimizer that keeps its groups"
        )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the rate of every group to its own peak rate times the schedule's factor. No host sync."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


@torch.no_grad()
def clip(module: nn.Module, largest: float) -> None:
    """If the norm of all gradients of `module` together is larger than `largest`, scale them down to that norm.

    Does the same as torch's clip_grad_norm_, but also if the norm of finite gradients overflows float32; torch then
    sets all gradients to zero. Gradients that are not finite stay so. No host sync; three passes over the gradients.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return
    norm = torch.nn.utils.get_total_norm(gradients)
    norm64 = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).norm()
    usual = norm.isfinite()
    # two multiplications, since the product of both factors may be too small for float32
    first = torch.where(usual, 1.0, TINY)
    then = torch.where(usual, (largest / (norm + 1e-6)).clamp(max=1.0), (largest / (norm64 * TINY)).float())
    torch._foreach_mul_(gradients, first)
    torch._foreach_mul_(gradients, then)


def zero_new_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set the momentum that torch's SGD would allocate in its next step to zeros.

    Under float16, if a gradient has overflowed, SGD's fused kernel skips the update, but leaves newly created momentum
    as uninitialised memory. Momentum that begins with zeros equals the gradient after the first update, which is the
    value that torch itself begins with, so nothing else changes. No host sync.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@dataclass(frozen=True)
class Packed:
    """An optimizer's state for a checkpoint: tensors named `<parameter>/<key>`, and all that is not a tensor."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]  # "state": {"<parameter>/<key>": number}, "groups": [hyper-parameters]


def pack(optimizer: torch.optim.Optimizer, module: nn.Module) -> Packed:
    """The optimizer's state by names of parameters, not copied, and its groups' hyper-parameters without OWN_KEYS."""
    names = {id(p): name for name, p in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"{names[id(parameter)]}/{key}"] = value
    groups = [{k: v for k, v in group.items() if k not in OWN_KEYS} for group in optimizer.param_groups]
    return Packed(tensors, {"state": scalars, "groups": groups})


def unpack(optimizer: torch.optim.Optimizer, module: nn.Module, packed: Packed) -> None:
    """Restore what `pack` returned into this optimizer: each tensor in its own type, with its parameter's strides.

    torch's `load_state_dict` is not used, because it casts state to the parameter's type. The strides have to be set
    because files do not keep them, and fused SGD and Adam silently compute wrong weights if a momentum buffer has
    another memory layout than its parameter. Raises StorageError if the state does not belong to this optimizer.
    """
    groups = packed.scalars["groups"]
    if len(groups) != len(optimizer.param_groups):
        raise StorageError(
            f"the checkpoint's optimizer has {len(groups)} groups, this one {len(optimizer.param_groups)}"
        )
    merged = [
        {**_lists_as_tuples(saved), **{key: mine[key] for key in OWN_KEYS if key in mine}}
        for mine, saved in zip(optimizer.param_groups, groups, strict=True)
    ]
    names = dict(module.named_parameters())
    fused = {id(p): bool(g.get("fused") or g.get("capturable")) for g in merged for p in g["params"]}
    state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
    for full_name, value in {**packed.tensors, **packed.scalars["state"]}.items():
        name, _, key = full_name.rpartition("/")
        if name not in names:
            raise StorageError(f"the checkpoint's optimizer has state for {name!r}, which this network lacks")
        parameter = names[name]
        if isinstance(value, Tensor):
            value = _placed(value, parameter, key, fused[id(parameter)])
        state[parameter][key] = value
    optimizer.__setstate__({"state": state, "param_groups": merged})


def _placed(value: Tensor, parameter: Tensor, key: str, fused: bool) -> Tensor:
    """A copy of `value` on the parameter's device, with the parameter's strides if it has the same shape."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    # torch's optimizers count steps on the host unless their kernel reads the count
    return value.to(parameter.device if fused or key != "step" else "cpu", copy=True)


def _lists_as_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with tuples again, which JSON has turned into lists, such as Adam's betas."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
