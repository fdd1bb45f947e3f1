"""An evaluation counts, and leaves the network as it was: its values, and the mode of every module."""

from __future__ import annotations

import copy

import pytest
import torch
from small_network import all_in_evaluation_mode, frozen_norm, small
from torch import nn

from dtrain.data.loader import Batch
from dtrain.model.evaluation import evaluate, evaluation_mode
from dtrain.model.network import Average, Network
from dtrain.world import Ask, Place, World


class Parts:
    """A batch of 12 images in `rounds` rounds."""

    rounds = 3

    def batch(self, turn: int) -> Batch:
        data = torch.Generator().manual_seed(turn)
        return Batch(torch.randn(4, 3, 32, 32, generator=data), torch.arange(4), torch.arange(4), torch.tensor(0))


class Clock:
    """Wishes for nothing."""

    def ask(self) -> Ask:
        return Ask()


@pytest.mark.parametrize("build", [small, frozen_norm, all_in_evaluation_mode])
def test_an_evaluation_leaves_every_module_in_its_mode_and_every_value(build: object) -> None:
    module: nn.Module = build(5)  # type: ignore[operator]
    modes = {name: each.training for name, each in module.named_modules()}
    average = Average(module, 0.9)
    before = copy.deepcopy(module.state_dict())
    network = Network(module, module, torch.float32, torch.device("cpu"))
    results, _ = evaluate(network, {"raw": module, "ema": average.module}, Parts(), World(Place(), 1.0), Clock())
    assert results is not None
    assert results["raw"].images == 12
    assert {name: each.training for name, each in module.named_modules()} == modes
    assert not any(each.training for each in average.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_networks_own_train_is_called_and_modes_come_back_after_an_error() -> None:
    class Switches(nn.Sequential):
        calls: list[bool] = []

        def train(self, mode: bool = True) -> Switches:
            self.calls.append(mode)
            super().train(mode)
            return self

    module = Switches(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    module[0].eval()
    with pytest.raises(ValueError, match="in the middle"), evaluation_mode(module):
        assert not module[1].training
        raise ValueError("in the middle")
    assert module.calls == [False, True]
    assert [each.training for each in module] == [False, True]
