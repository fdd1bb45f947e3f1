"""One exact pass over a split: every image once, counted in integers, the same for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import nn

from dtrain.data.loader import Loader, Request
from dtrain.model.metrics import Sums, no_sums
from dtrain.model.network import Network
from dtrain.model.step import eval_step
from dtrain.world import Ask, Clock, World


def chunks_of(samples: npt.NDArray[np.int64], size: int, world: World) -> tuple[int, Callable[[int], Request | None]]:
    """How a split is cut: into chunks of `size`, of which process r takes r, r + W, ...

    samples: the split's sample indices, int64 [n]. Returns the number of rounds (equal on every process, so that all
    meet in each) and the request of a round, None where this process has no chunk. The chunks are the same for every
    W, since other chunk sizes give other roundings and can flip a tie.
    """
    rounds = math.ceil(math.ceil(len(samples) / size) / world.size)

    def request_at(turn: int) -> Request | None:
        first = (turn * world.size + world.rank) * size
        return Request(samples[first : first + size], None) if first < len(samples) else None

    return rounds, request_at


def evaluate(
    network: Network,
    modules: Mapping[str, nn.Module],
    loader: Loader,
    requests: tuple[int, Callable[[int], Request | None]],
    world: World,
    clock: Clock,
) -> tuple[dict[str, Sums] | None, Ask]:
    """Evaluate each of `modules` (by name: "raw", "ema") on the loader's chunks; None if asked to stop meanwhile.

    Rank 0's buffers are the run's: they are sent to the others first. Collective; one host sync at the end. Returns
    also what was agreed, for the loop to act on.
    """
    sums = {name: no_sums(network.device) for name in modules}
    training = {name: module.training for name, module in modules.items()}
    save = False
    try:
        for module in modules.values():
            world.broadcast(list(module.buffers()))
            module.eval()
        rounds, request_at = requests
        for turn in range(rounds):
            if request_at(turn) is not None:
                batch = loader.batch(turn)
                for name, module in modules.items():
                    sums[name] += eval_step(network, module, batch)
            ask = world.agreed(clock)
            save = save or ask.save
            if ask.stop:
                return None, Ask(save=save, stop=True)
        return {name: Sums.of(world.total(value)) for name, value in sums.items()}, Ask(save=save)
    finally:
        for name, module in modules.items():
            module.train(training[name])
