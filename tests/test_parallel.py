"""Ways to train on several processes: what each makes of a module, and that a compiled one is compiled."""

from __future__ import annotations

import pytest
import torch
from small_network import small
from warm import Warm

from dtrain.model.network import wrap
from dtrain.model.parallel import Alone, Replicated, way_for

CPU = torch.device("cpu")


def test_one_process_computes_with_the_module_itself() -> None:
    module = small(5)
    network = wrap(module, device=CPU, dtype=torch.float32)
    assert network.trained is network.module is module
    assert isinstance(way_for(1, CPU, moving_buffers=True), Alone)
    assert isinstance(way_for(2, CPU, moving_buffers=True), Replicated)
    assert network.tensors().keys() == module.state_dict().keys()
    with network.keep_gradients_local():
        network.trained(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("channels_last", "stride"), [(True, (27, 1, 9, 3)), (False, (27, 9, 3, 1))])
def test_filters_lie_in_memory_as_asked(channels_last: bool, stride: tuple[int, ...]) -> None:
    network = wrap(small(5), device=CPU, dtype=torch.float32, channels_last=channels_last)
    assert network.module.get_parameter("0.weight").stride() == stride


@pytest.mark.dist
@pytest.mark.slow
def test_a_network_that_is_a_sequential_is_compiled_also_under_ddp(ranks: Warm) -> None:
    assert ranks.call("test_parallel:graphs", 2, timeout=240) == [1, 1]


def graphs() -> int:
    """How many graphs torch makes of a small network that is compiled on this process among others."""
    from torch._dynamo.utils import counters

    from dtrain.world import World, place

    torch.set_num_threads(1)
    world = World(place(), 200)
    world.meet()
    world.join("gloo")
    network = wrap(small(5), device=CPU, dtype=torch.float32, compiled=True, world_size=2)
    network.trained(torch.randn(2, 3, 32, 32)).sum().backward()
    world.leave()
    return int(counters["stats"]["unique_graphs"])
