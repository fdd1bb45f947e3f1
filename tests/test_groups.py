"""Parameters are grouped by what they are: roles, decay, rates of layers and of the head, and what is frozen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_network import small
from test_resume import Runs
from torch import Tensor, nn
from warm import Warm

from dtrain import plugins
from dtrain.data.loader import Batch
from dtrain.errors import PluginError, UsageError
from dtrain.model.groups import FOREVER, Frozen, Group, freeze, frozen_until, group_rows, grouped, head_of, roles_of
from dtrain.model.learner import learner_of
from dtrain.model.network import Network
from dtrain.model.optimization import build_optimizer, chosen_optimizer
from dtrain.model.step import StepOptions, train_step
from dtrain.plan import Share
from dtrain.settings.optimization import Optimization


class Transformer(nn.Module):
    """One of the usual kind for sequences of eight words; the classifier is registered first and used last."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(4, 3)
        self.auxiliary = nn.Linear(4, 3)
        self.place = nn.Parameter(torch.zeros(1, 9, 4))
        self.first = nn.Parameter(torch.zeros(1, 1, 4))
        self.words = nn.Embedding(10, 4)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2)))
        self.narrow = nn.Linear(4, 1)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([self.first.expand(len(words), -1, -1), self.words(words)], 1) + self.place
        features = self.blocks(tokens)[:, 0]
        return self.classify(features * self.narrow(features).sigmoid()), self.auxiliary(features)


def built(name: str, **options: Any) -> nn.Module:
    module: nn.Module = plugins.load(plugins.find("architecture", name))(10, **options)
    return module


def test_the_head_is_what_the_logits_come_from_and_not_what_is_registered_last() -> None:
    transformer = Transformer()
    assert set(head_of(transformer, transformer(torch.zeros(2, 8, dtype=torch.int64)))) == {
        "classify.weight",
        "classify.bias",
        "auxiliary.weight",
        "auxiliary.bias",
    }
    for name in ("allcnn_c", "resnet18"):
        module = built(name)
        assert head_of(module, module(torch.zeros(2, 3, 32, 32))) == ("classify.weight", "classify.bias")
    module = small(5)
    assert head_of(module, module(torch.zeros(2, 3, 32, 32))) == ("9.weight", "9.bias")
    assert head_of(module, torch.zeros(2, 5)) == ()  # without a graph there is nothing to be found


def test_a_network_can_name_its_head() -> None:
    class Named(nn.Sequential):
        names: tuple[str, ...] = ("0", "1.bias")

        def head_names(self) -> tuple[str, ...]:
            return self.names

    module = Named(nn.Linear(2, 2), nn.Linear(2, 2))
    assert head_of(module, module(torch.zeros(1, 2))) == ("0.weight", "0.bias", "1.bias")
    Named.names = ("nothing",)
    with pytest.raises(PluginError, match="gives 'nothing', which is no parameter or module of it"):
        head_of(module, module(torch.zeros(1, 2)))


def test_roles_follow_from_properties() -> None:
    roles = roles_of(Transformer(), ["classify.weight", "classify.bias"])
    assert roles["classify.weight"] == roles["classify.bias"] == "head"
    assert roles["place"] == roles["first"] == roles["words.weight"] == "embedding"
    assert roles["narrow.weight"] == "filter"  # one output, and still a linear layer
    assert roles["blocks.0.self_attn.in_proj_weight"] == roles["blocks.1.linear1.weight"] == "filter"
    assert roles["blocks.0.norm1.weight"] == roles["narrow.bias"] == "vector"


def test_without_settings_there_are_two_groups_in_the_order_of_the_network() -> None:
    module = small(5)
    names = [name for name, _ in module.named_parameters()]
    matrices = {"0.weight", "4.weight", "9.weight"}
    many, few = grouped(module, lr=0.1, head=("9.weight", "9.bias"))
    assert many.params == tuple(name for name in names if name in matrices)
    assert few.params == tuple(name for name in names if name not in matrices)
    assert (many.decays, few.decays) == (True, False)
    assert many.roles == ("filter", "filter", "head")
    assert {many.lr, few.lr} == {0.1}
    assert {many.frozen_until, few.frozen_until} == {0}


def test_embeddings_and_what_a_module_names_do_not_decay() -> None:
    class Exempt(nn.Sequential):
        def no_weight_decay(self) -> set[str]:
            return {"0.weight", "not.there"}

    module = nn.Sequential(Transformer(), Exempt(nn.Linear(2, 2), nn.Linear(2, 2)))
    decayed = {name for group in grouped(module, lr=0.1) if group.decays for name in group.params}
    assert not decayed & {"0.place", "0.first", "0.words.weight", "1.0.weight", "1.1.bias"}
    assert {"0.classify.weight", "1.1.weight", "0.blocks.0.linear1.weight"} <= decayed


def rates(groups: list[Group]) -> dict[str, float]:
    return {name: group.lr for group in groups for name in group.params}


def test_layers_towards_the_images_have_smaller_rates() -> None:
    found = rates(grouped(small(5), lr=1.0, head=("9.weight", "9.bias"), layer_decay=0.5))
    assert {name: found[name] for name in ("0.weight", "1.bias", "4.weight", "5.weight", "9.weight", "9.bias")} == {
        "0.weight": 0.25,
        "1.bias": 0.25,  # a norm goes with the filters before it
        "4.weight": 0.5,
        "5.weight": 0.5,
        "9.weight": 1.0,
        "9.bias": 1.0,
    }
    head = ("classify.weight", "classify.bias", "auxiliary.weight", "auxiliary.bias")
    found = rates(grouped(Transformer(), lr=1.0, head=head, layer_decay=0.5))  # words, two blocks, narrow, head
    wanted = {"place": 0.0625, "words.weight": 0.0625, "blocks.0.norm1.bias": 0.125, "blocks.1.linear1.weight": 0.25}
    assert {name: found[name] for name in wanted} == wanted
    assert (found["narrow.weight"], found["classify.weight"]) == (0.5, 1.0)


def test_layers_can_be_told_as_timm_does() -> None:
    class Told(Transformer):
        def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
            return {"stem": r"^place|first|words", "blocks": [(r"^blocks\.(\d+)", None), (r"^narrow", (99999,))]}

    found = rates(grouped(Told(), lr=1.0, layer_decay=0.5))
    wanted = {"place": 0.125, "words.weight": 0.125, "blocks.0.norm1.bias": 0.25, "blocks.1.norm1.bias": 0.5}
    assert {name: found[name] for name in wanted} == wanted
    assert found["narrow.weight"] == 0.5  # goes with the block before it
    assert found["classify.weight"] == 1.0


def test_the_layers_of_a_network_of_timm_are_timms() -> None:
    timm_optim = pytest.importorskip("timm.optim")
    from timm import create_model

    module = create_model("vit_tiny_patch16_224", num_classes=5)
    groups = timm_optim.param_groups_layer_decay(module, weight_decay=0.1, layer_decay=0.75)
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = rates(grouped(module, lr=1.0, head=("head.weight", "head.bias"), layer_decay=0.75))
    assert found == pytest.approx({name: by_id[id(p)] for name, p in module.named_parameters()})


def test_the_head_can_have_a_rate_of_its_own() -> None:
    module = small(5)
    groups = grouped(module, lr=0.1, head=("9.weight", "9.bias"), head_lr=0.7)
    assert {name for name, rate in rates(groups).items() if rate == 0.7} == {"9.weight", "9.bias"}
    optimizer = build_optimizer(chosen_optimizer(Optimization(opt="sgd", lr=0.1)), groups, module)
    given = {name: g["initial_lr"] for g in optimizer.param_groups for name in g["param_names"]}
    assert given == rates(groups)


def test_the_head_keeps_a_rate_of_its_own_that_happens_to_be_that_of_all() -> None:
    module = small(5)
    groups = grouped(module, lr=0.1, head=("9.weight", "9.bias"), head_lr=0.1)
    choice = chosen_optimizer(Optimization(opt="muon", opt_opt={"aux_lr": "0.02"}, lr=0.1))
    made = build_optimizer(choice, groups, module).param_groups
    given = {name: group["initial_lr"] for group in made for name in group["param_names"]}
    assert {name: given[name] for name in ("0.weight", "0.bias", "9.weight", "9.bias")} == {
        "0.weight": 0.1,
        "0.bias": 0.02,
        "9.weight": 0.1,
        "9.bias": 0.1,
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0.*", {"0.weight": FOREVER, "0.bias": FOREVER}),
        ("[01].weight@2", {"0.weight": 2, "1.weight": 2}),
        ("0.*@2,*.bias@3,0.bias@1", {"0.weight": 2, **dict.fromkeys(("0.bias", "1.bias", "4.bias"), 3)}),
        ("0.*,0.*@2", {"0.weight": FOREVER, "0.bias": FOREVER}),
    ],
)
def test_patterns_freeze_for_good_or_until_an_epoch(text: str, wanted: dict[str, float]) -> None:
    found = frozen_until(text.split(","), small(5))
    assert {name: found[name] for name in wanted} == wanted
    assert found.keys() - wanted.keys() <= {"5.bias", "9.bias"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stam.*", "--freeze stam.*: matches no parameter of this network; did you mean 'stem.*'?"),
        ("stem.*@soon", "--freeze stem.*@soon: give PATTERN, or PATTERN@EPOCH with an epoch from 1 up: stem.*@3"),
        ("stem.*@0", "--freeze stem.*@0: give PATTERN, or PATTERN@EPOCH"),
        ("*@3", "--freeze *@3: no parameter is left to be trained from the start; freeze fewer"),
    ],
)
def test_what_cannot_be_frozen_is_told(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        frozen_until([text], built("resnet18"))


def test_norms_of_a_frozen_part_keep_still() -> None:
    module = nn.Sequential(small(5), nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 5)))
    until = frozen_until(["0.1.*", "0.5.weight", "1.*@2"], module)
    freeze(module, until)
    assert [p.requires_grad for p in module[0][1].parameters()] == [False, False]
    assert not module[0][1].training
    assert module[0][5].training  # its bias is trained
    frozen, bare = Frozen(module, until), module[1][0]
    modes = []
    for epoch in (0, 1, 2, 0):
        frozen.hold(epoch)
        modes.append(bare.training)
    assert modes == [False, False, True, False]
    assert not module[0][1].training


def batch() -> Batch:
    data = torch.Generator().manual_seed(1)
    return Batch(torch.randn(8, 3, 32, 32, generator=data), torch.arange(8) % 5, torch.arange(8), torch.tensor(0))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_what_is_frozen_until_an_epoch_neither_moves_nor_has_state_before(optimizer: str) -> None:
    module = small(5)
    until = frozen_until(["[01].*@2"], module)
    groups = grouped(module, lr=0.1, until=until)
    made = build_optimizer(chosen_optimizer(Optimization(opt=optimizer, lr=0.1)), groups, module)
    network = Network(module, module, torch.float32, torch.device("cpu"))
    learner = learner_of(network, made, until=until)
    held, others = [*module[0].parameters(), *module[1].parameters()], list(module[4].parameters())
    before = [value.clone() for value in (*module[0].state_dict().values(), *module[1].state_dict().values())]

    def now() -> list[Tensor]:
        return [*module[0].state_dict().values(), *module[1].state_dict().values()]

    for epoch in (0, 1):
        train_step(learner, batch(), StepOptions(0.0, 1.0), Share(0, (8,), 8), epoch)
        assert all(torch.equal(a, b) for a, b in zip(before, now(), strict=True))
    assert not any(p in made.state for p in held)
    assert all(p in made.state for p in others)
    train_step(learner, batch(), StepOptions(0.0, 1.0), Share(0, (8,), 8), 2)
    assert not torch.equal(before[0], module[0].weight)
    assert not torch.equal(before[4], module[1].running_mean)


def test_rows_name_roles_and_what_the_optimizer_made_of_rates_and_decays() -> None:
    module = small(5)
    until = frozen_until(["0.*", "1.*@2"], module)
    freeze(module, until)
    groups = grouped(module, lr=0.1, head=("9.weight", "9.bias"), until=until)
    options = {"aux_lr": "0.02", "aux_weight_decay": "0.25"}
    choice = chosen_optimizer(Optimization(opt="muon", opt_opt=options, lr=0.1, weight_decay=0.5))
    assert group_rows(build_optimizer(choice, groups, module), groups, module) == [
        ("filter", "rate 0.1, decay 0.5: 1,152 parameters in 4.weight"),
        ("head", "rate 0.02, decay 0.25: 80 parameters in 9.weight"),
        ("vector", "rate 0.02, decay 0, frozen until epoch 2: 16 parameters in 1.weight, 1.bias"),
        ("vector", "rate 0.02, decay 0: 48 parameters in 4.bias, 5.weight, 5.bias"),
        ("head", "rate 0.02, decay 0: 5 parameters in 9.bias"),
        ("frozen", "224 parameters in 0.weight, 0.bias"),
    ]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.dist
@pytest.mark.parametrize(("world", "stops"), [(1, (2, 3, 4)), (2, (3,))])
def test_freezing_and_rates_of_layers_resume_to_the_bit(
    ranks: Warm, tmp_path: Path, cache: Path, world: int, stops: tuple[int, ...]
) -> None:
    # 3 steps an epoch: what is frozen until epoch 1 is trained from step 4 on
    more = {"freeze": "0.weight,[15].*@1", "layer_decay": 0.7, "head_lr": 0.03, "batch_size": 400}
    some = Runs(ranks, tmp_path, cache, "muon", False, more)
    straight = some.go(world, [("straight", None), *((f"at-{k}", k) for k in stops)])["straight"]
    assert some.go(world, [(f"at-{k}", None) for k in stops]) == {f"at-{k}": straight for k in stops}


def leaves_out(param_groups, *, lr=0.1):  # type: ignore[no-untyped-def]  # as a stranger writes it
    return torch.optim.SGD(param_groups[0]["params"], lr)


def flattens(param_groups, *, lr=0.1):  # type: ignore[no-untyped-def]
    return torch.optim.SGD([p for group in param_groups for p in group["params"]], lr)


def test_an_optimizer_that_ignores_parameters_or_rates_is_refused() -> None:
    module, here = small(5), f"{__file__}:"
    choice = chosen_optimizer(Optimization(opt=f"{here}leaves_out"))
    with pytest.raises(PluginError, match=r"leaves out the parameter 0.bias \(7 in all\), so it would never train"):
        build_optimizer(choice, grouped(module, lr=0.1), module)
    choice = chosen_optimizer(Optimization(opt=f"{here}flattens"))
    build_optimizer(choice, grouped(module, lr=0.1), module)  # with one rate for all nothing is lost
    with pytest.raises(PluginError, match="one rate to all parameters, so --layer-decay and --head-lr would have no"):
        build_optimizer(choice, grouped(module, lr=0.1, layer_decay=0.5), module)


def test_a_rate_of_the_head_needs_a_head() -> None:
    with pytest.raises(UsageError, match="--head-lr: no head was found in this network"):
        grouped(small(5), lr=0.1, head_lr=0.2)
