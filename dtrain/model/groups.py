"""Parameter groups: which parameters have weight decay, which learning rate, and from which epoch on they are trained.

head_of        the parameters of the head, which computes the logits
frozen_until   reads `--freeze`: the epoch from which on each frozen parameter is trained
freeze         freezes what is frozen for the whole run, before the network is wrapped in DDP
Frozen         keeps what is frozen until an epoch from being trained before it
grouped        makes the groups, which `optimization.build_optimizer` gives to the optimizer

Groups hold names and not tensors, so that they can be made before the network is moved, compiled or wrapped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from dtrain.errors import PluginError, UsageError, nearest

Role = Literal["filter", "head", "embedding", "vector"]
FOREVER = math.inf  # the epoch of what is frozen for the whole run
NAMED = 3  # the most parameters that a line of `group_rows` lists by name
MATCH_PREVIOUS = 99999  # timm's suffix in a group_matcher for what belongs to the layer before it


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike.

    params: their names, in their order in the network. roles: the role of each; see `roles_of`. decays: whether weight
    decay applies to them. lr: their peak learning rate, already multiplied by lr_scale. lr_scale: the factor of
    `--layer-decay` for them, in (0, 1], or None where the rate is their own (`--head-lr`). frozen_until: the epoch
    (0-based) from which on they are trained.
    """

    name: str
    params: tuple[str, ...]
    roles: tuple[Role, ...]
    decays: bool
    lr: float
    lr_scale: float | None
    frozen_until: float


# -- what a parameter is for -------------------------------------------------------------------------------------------


def head_of(module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> tuple[str, ...]:
    """The names of the head's parameters, which are those that compute the logits, auxiliary logits included.

    If the network has a method `head_names()`, it returns their names, or names of the modules that hold them.
    Otherwise they are found in autograd's graph of `output`: for each tensor of logits, the parameter with two
    dimensions or more that is the fewest operations away from it (all of these if there are several), and the other
    parameters of the same module. The result is empty if the graph has no such parameter. Raises PluginError if
    `head_names()` gives a name that the network does not have.
    """
    names = [name for name, _ in module.named_parameters()]
    if callable(own := getattr(module, "head_names", None)):
        found: set[str] = set()
        for given in own():
            matching = [name for name in names if name == given or name.startswith(f"{given}.")]
            if not matching:
                raise PluginError(f"head_names() of the network gives {given!r}, which is no parameter or module of it")
            found.update(matching)
    else:
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        outputs = output if isinstance(output, tuple) else (output,)
        owners = {name_of[id(p)].rpartition(".")[0] for logits in outputs for p in _nearest(logits, name_of)}
        found = {name for name in names if name.rpartition(".")[0] in owners}
    return tuple(name for name in names if name in found)


def _nearest(logits: Tensor, known: Mapping[int, str]) -> list[Tensor]:
    """The parameters among `known`, with two dimensions or more, that are nearest to `logits` in its autograd graph."""
    level = {logits.grad_fn} if logits.grad_fn is not None else set()
    seen = set(level)
    while level:
        leaves = [leaf for node in level if isinstance(leaf := getattr(node, "variable", None), Tensor)]
        if found := [leaf for leaf in leaves if leaf.ndim >= 2 and id(leaf) in known]:
            return found
        level = {after for node in level for after, _ in node.next_functions if after is not None} - seen
        seen |= level
    return []


def roles_of(module: nn.Module, head: Iterable[str] = ()) -> dict[str, Role]:
    """The role of each parameter, decided by its properties and never by its name.

    vector: fewer than two dimensions. embedding: the weight of an nn.Embedding or EmbeddingBag, or a parameter whose
    first dimension is 1 and that belongs to no convolution or linear layer, such as a position embedding, a class token
    or a scale for each channel. head: what is named in `head`. filter: all others.
    """
    heads, roles = set(head), dict[str, Role]()
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        if name in heads:
            roles[name] = "head"
        elif parameter.ndim < 2:
            roles[name] = "vector"
        else:
            roles[name] = "embedding" if _embeds(parameter, owner) else "filter"
    return roles


def _embeds(parameter: Tensor, owner: nn.Module) -> bool:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return True
    return parameter.shape[0] == 1 and not isinstance(owner, _ConvNd | nn.Linear | nn.Bilinear)


# -- what is frozen ----------------------------------------------------------------------------------------------------


def frozen_until(patterns: Sequence[str], module: nn.Module) -> dict[str, float]:
    """The epoch (0-based) from which on each frozen parameter is trained; FOREVER if it is frozen for the whole run.

    patterns: the values of `--freeze`, each `PATTERN` or `PATTERN@EPOCH`, with the wildcards of file names (`*`, `?`,
    `[...]`). If several patterns match a parameter, the one that freezes it longest applies. Raises UsageError for a
    pattern that matches no parameter, an epoch that is not a whole number above 0, and if no parameter would be trained
    from the start.
    """
    names, until = [name for name, _ in module.named_parameters()], dict[str, float]()
    for text in patterns:
        pattern, at, epoch = text.rpartition("@") if "@" in text else (text, "", "")
        if at and (not epoch.isdecimal() or int(epoch) == 0):
            raise UsageError(f"--freeze {text}: give PATTERN, or PATTERN@EPOCH with an epoch from 1 up: stem.*@3")
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            blocks = {f"{name.split('.')[0]}.*" if "." in name else name for name in names}
            raise UsageError(f"--freeze {text}: matches no parameter of this network; {nearest(pattern, blocks)}")
        for name in matching:
            until[name] = max(until.get(name, 0.0), int(epoch) if at else FOREVER)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    if until and all(name in until for name in trained):
        raise UsageError(
            f"--freeze {','.join(patterns)}: no parameter is left to be trained from the start; freeze fewer"
        )
    return until


def freeze(module: nn.Module, until: Mapping[str, float]) -> None:
    """Freeze what is frozen for the whole run: it gets no gradient, and its batch norms go into evaluation mode.

    A batch norm is put into evaluation mode if all its parameters are frozen. Call this before the network is wrapped:
    DistributedDataParallel decides only once which parameters have gradients.
    """
    for name, parameter in module.named_parameters():
        if until.get(name) == FOREVER:
            parameter.requires_grad_(False)
    for norm, epoch in _norms(module, until):
        if epoch == FOREVER:
            norm.eval()


def _norms(module: nn.Module, until: Mapping[str, float]) -> Iterator[tuple[nn.Module, float]]:
    """Each batch norm or similar layer, with the epoch until which all its parameters are frozen.

    If it has no parameters of its own, those of the module around it decide.
    """
    names = [name for name, _ in module.named_parameters()]
    for name, norm in module.named_modules():
        if not isinstance(norm, _NormBase):
            continue
        owner, mine = name, [n for n in names if n.startswith(f"{name}.")]
        while not mine and owner:
            owner = owner.rpartition(".")[0]
            mine = [n for n in names if n.startswith(f"{owner}." if owner else "")]
        yield norm, min((until.get(n, 0.0) for n in mine), default=0.0)


class Frozen:
    """Keeps parts of a module frozen until an epoch.

    Gradients of the frozen parameters are still computed, since DDP expects them, but they are dropped before the
    update. Create it while every module is in the mode in which the run begins.
    """

    def __init__(self, module: nn.Module, until: Mapping[str, float]) -> None:
        self._parameters = [(p, until[n]) for n, p in module.named_parameters() if until.get(n, FOREVER) != FOREVER]
        staged = [(norm, epoch) for norm, epoch in _norms(module, until) if 0 < epoch < FOREVER]
        self._norms = [(norm, epoch, norm.training) for norm, epoch in staged]

    def hold(self, epoch: int) -> None:
        """Put batch norms into their mode for `epoch` (0-based). Call it before the forward pass of each step."""
        for norm, until, training in self._norms:
            norm.training = training and epoch >= until

    def drop_gradients(self, epoch: int) -> None:
        """Drop the gradients of what is frozen in `epoch` (0-based). Call it after the backward pass of each step.

        The optimizer then skips these parameters, and makes no state for them.
        """
        for parameter, until in self._parameters:
            if epoch < until:
                parameter.grad = None


# -- groups ------------------------------------------------------------------------------------------------------------


def grouped(
    module: nn.Module,
    *,
    lr: float,
    head: Sequence[str] = (),
    until: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    head_lr: float | None = None,
) -> list[Group]:
    """The groups of all parameters that require gradients. Groups with weight decay come first.

    lr: the peak learning rate. head: the names that `head_of` returns. until: what `frozen_until` returns. layer_decay:
    each layer's rate is this factor times that of the next layer towards the head. head_lr: the head's peak rate in
    place of `lr`. Weight decay does not apply to parameters with fewer than two dimensions, to embeddings, and to what
    a module's `no_weight_decay()` names.
    """
    roles, exempt, until = roles_of(module, head), _without_decay(module), until or {}
    if head_lr is not None and not head:
        raise UsageError("--head-lr: no head was found in this network; give it head_names(), or leave the flag out")
    depths = _depths(module, set(head)) if layer_decay is not None else {}
    members: dict[tuple[bool, float, float | None, float], list[str]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and roles[name] != "embedding" and name not in exempt
        factor = (layer_decay or 1.0) ** depths.get(name, 0)
        rate, scale = (head_lr, None) if head_lr is not None and roles[name] == "head" else (lr * factor, factor)
        members.setdefault((decays, rate, scale, until.get(name, 0.0)), []).append(name)
    groups = []
    for (decays, rate, scale, epoch), names in sorted(members.items(), key=lambda item: not item[0][0]):
        label = "decay" if decays else "no_decay"
        label += f"-rate-{rate:.4g}" if rate != lr else ""
        label += f"-from-epoch-{epoch:g}" if epoch else ""
        groups.append(Group(label, tuple(names), tuple(roles[n] for n in names), decays, rate, scale, epoch))
    return groups


def _without_decay(module: nn.Module) -> set[str]:
    """The parameters that `no_weight_decay()` of the network or of a module in it names; may use wildcards."""
    names, exempt = [name for name, _ in module.named_parameters()], set[str]()
    for prefix, each in module.named_modules():
        if callable(own := getattr(each, "no_weight_decay", None)):
            patterns = [f"{prefix}.{given}" if prefix else given for given in own()]
            exempt.update(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    return exempt


def _depths(module: nn.Module, head: set[str]) -> dict[str, int]:
    """How many layers each parameter is away from the head. The head itself has 0."""
    if callable(matcher := getattr(module, "group_matcher", None)):
        layers = _layers_by_matcher([name for name, _ in module.named_parameters()], matcher())
    else:
        layers = _layers_by_order(module, head)
    last = max(layers.values(), default=0)
    return {name: last - layer for name, layer in layers.items()}


def _layers_by_order(module: nn.Module, head: set[str]) -> dict[str, int]:
    """The layer number of each parameter, from 0, by the order in which the network's blocks are registered.

    A block is a child of the network, or of a Sequential or ModuleList in it. A block whose parameters all have fewer
    than two dimensions, such as a norm, belongs to the layer before it. Parameters of the network itself belong to the
    first layer, and the head is the last.
    """
    rest = {name: parameter.ndim for name, parameter in module.named_parameters() if name not in head}
    layers, layer, filled = dict[str, int](), 0, False
    for block in _blocks(module):
        mine = [name for name in rest if name.startswith(block)]
        many = any(rest[name] >= 2 for name in mine)
        layer += many and filled
        filled = filled or many
        layers.update(dict.fromkeys(mine, layer))
    first = {name: 0 for name in rest if name not in layers}
    return {**first, **layers, **dict.fromkeys(head, layer + filled)}


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}."


def _layers_by_matcher(names: Sequence[str], matcher: Mapping[str, Any] | Callable[[str], Any]) -> dict[str, int]:
    """The layer number of each parameter by timm's `group_matcher()`: a mapping of regular expressions, or a function.

    An entry of the mapping is a regular expression, or a list of (expression, suffix). Layers are sorted by a key: the
    position of the entry, the groups that the expression matched, and the suffix. What matches nothing, which is the
    head, comes last.
    """
    keys = {name: _key_of(name, matcher) for name in names}
    layers, layer = dict[tuple[float, ...], int](), -1
    for key in sorted(set(keys.values())):
        if layer < 0 or key[-1] != MATCH_PREVIOUS:
            layer += 1
        layers[key] = layer
    return {name: layers[key] for name, key in keys.items()}


def _key_of(name: str, matcher: Mapping[str, Any] | Callable[[str], Any]) -> tuple[float, ...]:
    if not isinstance(matcher, Mapping):
        key = matcher(name)
        return tuple(key) if isinstance(key, Iterable) else (key,)
    for place, entry in enumerate(matcher.values()):
        for expression, suffix in entry if isinstance(entry, list | tuple) else [(entry, None)] if entry else []:
            if match := re.match(expression, name):
                return tuple(float(part) for part in (place, *match.groups(), *(suffix or ())) if part is not None)
    return (math.inf,)


# -- for people --------------------------------------------------------------------------------------------------------


def group_rows(optimizer: torch.optim.Optimizer, groups: Sequence[Group], module: nn.Module) -> list[tuple[str, str]]:
    """The optimizer's groups as a table for `--dry-run`, by role; the last row is for what is never trained.

    groups: the groups that the optimizer was built from. Rates and decays are those in the optimizer itself, which may
    have changed them.
    """
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    role_of = {name: role for group in groups for name, role in zip(group.params, group.roles, strict=True)}
    until = {name: group.frozen_until for group in groups for name in group.params}
    rows: list[tuple[str, str]] = []
    for made in optimizer.param_groups:
        names = [name_of[id(parameter)] for parameter in made["params"]]
        decay = f", decay {made['weight_decay']:.4g}" if "weight_decay" in made else ""
        for role, epoch in dict.fromkeys((role_of[name], until[name]) for name in names):
            mine = [name for name in names if (role_of[name], until[name]) == (role, epoch)]
            start = f", frozen until epoch {epoch:g}" if epoch else ""
            rows.append((role, f"rate {made['lr']:.4g}{decay}{start}: {_listed(mine, sizes)}"))
    if frozen := [name for name, parameter in module.named_parameters() if not parameter.requires_grad]:
        rows.append(("frozen", _listed(frozen, sizes)))
    return rows


def _listed(names: Sequence[str], sizes: Mapping[str, int]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{sum(sizes[name] for name in names):,} parameters in {', '.join(names[:NAMED])}{more}"
