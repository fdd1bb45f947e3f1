"""Claims about what comes with dtrain, and about the kit that finds what does not keep the contract."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrain import plugins
from dtrain.errors import PluginError
from dtrain.testing import check_architecture, check_optimizer


@pytest.fixture(scope="module", autouse=True)
def first_optimizer() -> None:
    torch.optim.SGD([torch.zeros(1)], 0.1)  # the first in a process makes torch set an environment variable


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(kind: plugins.Kind, name: str, *args: Any, **options: Any) -> Any:
    return plugins.load(plugins.find(kind, name))(*args, **options)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- architectures -----------------------------------------------------------------------------------------------------


def test_allcnn_c_is_the_published_table() -> None:
    # (in, out, kernel, stride, padding): Springenberg et al. 2015, table 1, model C with strides in place of pooling
    published = [
        (3, 96, 3, 1, 1),
        (96, 96, 3, 1, 1),
        (96, 96, 3, 2, 1),
        (96, 192, 3, 1, 1),
        (192, 192, 3, 1, 1),
        (192, 192, 3, 2, 1),
        (192, 192, 3, 1, 0),
        (192, 192, 1, 1, 0),
        (192, 10, 1, 1, 0),
    ]
    module = build("architecture", "allcnn_c", 10)
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    found = [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]) for m in layers]
    assert found == published
    assert parameters(module) == 1_369_738
    assert parameters(module) == sum(i * o * k * k + o for i, o, k, _, _ in published)
    assert not [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)]
    images = torch.zeros(2, 3, 32, 32)
    for layer in layers:
        nn.init.constant_(layer.bias, 1.0)
        nn.init.zeros_(layer.weight)
    assert torch.equal(module(images), torch.ones(2, 10))  # the classifier's maps, averaged, with no ReLU behind
    nn.init.constant_(layers[-1].bias, -1.0)
    assert torch.equal(module(images), -torch.ones(2, 10))


def test_allcnn_c_begins_with_kaimings_weights() -> None:
    module = build("architecture", "allcnn_c", 10)
    for layer in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        fan_in = layer.in_channels * layer.kernel_size[0] ** 2
        # n samples give a deviation within 4 / sqrt(2 n) of the true one, 4 sigma
        assert float(layer.weight.detach().std()) == pytest.approx(
            math.sqrt(2 / fan_in), rel=4 / math.sqrt(2 * layer.weight.numel())
        )
        assert not layer.bias.any()
    images = torch.randn(8, 3, 32, 32)
    assert 0.1 < float(module(images).detach().std()) < 10  # nine layers on, neither gone nor grown


def test_allcnn_c_drops_where_it_was_published_and_norms_in_place_of_biases() -> None:
    module = build("architecture", "allcnn_c", 10, dropout=True, norm="batch")
    drops = [(m.p, i) for i, m in enumerate(module.layers) if isinstance(m, nn.Dropout)]
    assert [p for p, _ in drops] == [0.2, 0.5, 0.5]
    assert drops[0][1] == 0
    for _, index in drops[1:]:  # behind the ReLU of a strided layer
        strided = next(m for m in reversed(module.layers[:index]) if isinstance(m, nn.Conv2d))
        assert strided.stride == (2, 2)
        assert isinstance(module.layers[index - 1], nn.ReLU)
    # a norm's two numbers a channel, but for the last layer, in place of a bias's one
    assert parameters(module) == 1_369_738 + 3 * 96 + 5 * 192
    assert [m.bias is None for m in module.modules() if isinstance(m, nn.Conv2d)] == [True] * 8 + [False]


def maps_of(resnet: Any, side: int) -> list[tuple[int, int]]:
    """Channels and side of what the stem and each of the four stages gives for square images of RGB."""
    found: list[tuple[int, int]] = []
    rooms = [resnet.stem, *resnet.stages[1::2]]
    for room in rooms:
        room.register_forward_hook(lambda *call: found.append((call[2].shape[1], call[2].shape[2])))
    with torch.no_grad():
        resnet.eval()(torch.zeros(1, 3, side, side))
    return found


def test_resnet18_in_its_cifar_form_halves_the_maps_three_times() -> None:
    module = build("architecture", "resnet18", 10)
    assert parameters(module) == 11_173_962
    assert module.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert maps_of(module, 32) == [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)]
    # a classifier for 100 in place of 10, a stem for 1 channel in place of 3
    assert parameters(build("architecture", "resnet18", 100, in_channels=1)) == 11_173_962 + 90 * 513 - 2 * 64 * 9


def test_resnet18_of_large_images_is_the_published_network() -> None:
    module = build("architecture", "resnet18", 1000, image_size=224)
    assert parameters(module) == 11_689_512  # what torchvision tells of its resnet18
    assert maps_of(module, 224) == [(64, 56), (64, 56), (128, 28), (256, 14), (512, 7)]  # He et al. 2016, table 1


def test_resnet18_takes_the_large_stem_from_96_pixels_on_unless_told() -> None:
    assert maps_of(build("architecture", "resnet18", 2, image_size=95), 95)[0] == (64, 95)
    assert maps_of(build("architecture", "resnet18", 2, image_size=96), 96)[0] == (64, 24)
    assert maps_of(build("architecture", "resnet18", 2, image_size=96, stem="small"), 96)[0] == (64, 96)
    assert maps_of(build("architecture", "resnet18", 2, image_size=32, stem="large"), 32)[0] == (64, 8)


def test_resnet18_with_zero_last_norms_begins_as_its_shortcuts() -> None:
    module = build("architecture", "resnet18", 10, zero_last_norm=True).eval()
    maps = torch.rand(1, 64, 8, 8)
    assert torch.equal(module.stages[0](maps), maps)


@pytest.mark.parametrize(
    ("name", "options"),
    [("allcnn_c", {}), ("allcnn_c", {"norm": "batch", "dropout": True}), ("resnet18", {"zero_last_norm": True})],
)
def test_the_zoos_architectures_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    check_architecture(name, image_size=16, num_classes=3, in_channels=1, **options)


# -- optimizers --------------------------------------------------------------------------------------------------------


def descend(module: nn.Module, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> list[Tensor]:
    """The parameters after five steps on keyed data, with a decay that spares what has one dimension."""
    matrices = {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": 0.05}
    vectors = {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0}
    optimizer = make([matrices, vectors])
    data = torch.Generator().manual_seed(1)
    for _ in range(5):
        optimizer.zero_grad()
        module(torch.randn(6, 7, generator=data)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "make"),
    [
        ("sgd", {"momentum": 0.8}, lambda g, f: torch.optim.SGD(g, 0.01, momentum=0.8, nesterov=True, fused=f)),
        ("sgd", {"momentum": 0.0}, lambda g, f: torch.optim.SGD(g, 0.01, fused=f)),
        ("adam", {"betas": (0.8, 0.9)}, lambda g, f: torch.optim.Adam(g, 0.01, (0.8, 0.9), fused=f)),
        ("adamw", {"eps": 1e-3}, lambda g, f: torch.optim.AdamW(g, 0.01, eps=1e-3, fused=f)),
    ],
)
def test_sgd_adam_and_adamw_are_torchs_bit_for_bit(
    name: str, options: dict[str, Any], make: Callable[..., torch.optim.Optimizer], fused: bool
) -> None:
    ours = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    theirs = copy.deepcopy(ours)
    found = descend(ours, lambda groups: build("optimizer", name, groups, lr=0.01, fused=fused, **options))
    wanted = descend(theirs, lambda groups: make(groups, fused))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [("sgd", {}), ("sgd", {"fused": False}), ("adam", {}), ("adamw", {"fused": False}), ("muon", {})],
)
def test_the_zoos_optimizers_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    check_optimizer(name, **options)


# -- the kit -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A sound network, for the broken ones below to break."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weigh = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.weigh(images.mean((2, 3)))
        return logits


class OtherEachTime(Small):
    count = 0

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        OtherEachTime.count += 1
        nn.init.constant_(self.weigh.weight, OtherEachTime.count)


class Idle(Small):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.idle = nn.Linear(2, 2)


class Forgetful(Small):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.offset = torch.randn(num_classes)  # no buffer, so in no state dict

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.offset


class Renamed(Small):
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return {f"old.{key}": value for key, value in super().state_dict().items()}


def test_a_sound_architecture_passes() -> None:
    check_architecture(Small)


@pytest.mark.parametrize(
    ("broken", "error", "told"),
    [
        (lambda n: Small(n + 1), PluginError, r"must return logits of shape \(2, 10\) for 3 x 32 x 32 images"),
        (lambda n: nn.Conv2d(1, n, 3), PluginError, "fails on 3 x 32 x 32 images: RuntimeError"),
        (lambda n: "network", PluginError, "returns a str, not a torch.nn.Module"),
        (OtherEachTime, AssertionError, "OtherEachTime gets different weights from the same seed"),
        (Idle, AssertionError, "parameter idle.weight gets no gradient"),
        (Forgetful, AssertionError, "gives different logits when its state dict is loaded"),
        (Renamed, AssertionError, "state dict does not load back"),
    ],
)
def test_the_kit_tells_what_is_wrong_with_an_architecture(broken: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        check_architecture(broken)


class OwnRate(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step()


class Secret(torch.optim.SGD):
    steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"] / self.steps)


class Wordy(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = {1, 2}


@pytest.mark.parametrize(
    ("broken", "error", "told"),
    [
        (lambda groups, lr: "sgd", PluginError, "returns a str, not a torch.optim.Optimizer"),
        (lambda groups, lr: torch.optim.SGD(groups[:1], lr), PluginError, "leaves out the parameter"),
        (OwnRate, AssertionError, "OwnRate changes weights at lr 0"),
        (
            lambda groups, lr: torch.optim.SGD([groups[0], {**groups[1], "lr": 0.0}], lr),
            AssertionError,
            "does not change biases",
        ),
        (Secret, AssertionError, "does not continue bit for bit from its saved state"),
        (Wordy, AssertionError, "keeps state that is neither a tensor nor a number"),
    ],
)
def test_the_kit_tells_what_is_wrong_with_an_optimizer(broken: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        check_optimizer(broken)
