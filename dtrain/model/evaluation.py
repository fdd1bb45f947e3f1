"""An evaluation: one exact pass over a split, whose counts are the same for any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import nn

from dtrain.data.batch import Batch
from dtrain.model.metrics import Sums, no_sums
from dtrain.model.network import Network
from dtrain.model.step import eval_step
from dtrain.world import Ask, Clock, World


class Chunks(Protocol):
    """This process's part of a split, in batches. Each process takes part in the same number of rounds."""

    @property
    def rounds(self) -> int:
        """The number of rounds: the number of batches of the process that has most of them."""
        ...

    def batch(self, turn: int) -> Batch | None:
        """The batch of round `turn` (0-based), or None where this process has no images left."""
        ...


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode; afterwards each of its submodules is in the mode that it was in before.

    `module.train()` alone would not do: it would set a batch norm that is kept frozen training again.
    """
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(modes[0][1])  # some networks override `train` and do more in it than to set the flags
        for each, training in modes:
            each.training = training


def evaluate(
    network: Network, modules: Mapping[str, nn.Module], chunks: Chunks, world: World, clock: Clock
) -> tuple[dict[str, Sums] | None, Ask]:
    """Evaluate each of `modules` on all chunks. Their names are "raw" for the weights and "ema" for their average.

    Returns two values: the sums over all processes by name, or None if the processes agreed to stop before the end; and
    the save or stop that they agreed on during the evaluation, which the training loop has to act on.
    Rank 0's buffers are sent to the other processes first, since these are the ones that a checkpoint holds.
    Afterwards each module is in the mode that it was in before. Collective; one host sync, at the end.
    """
    sums = {name: no_sums(network.device) for name in modules}
    save = False
    with contextlib.ExitStack() as modes:
        for module in modules.values():
            world.broadcast(list(module.buffers()))
            modes.enter_context(evaluation_mode(module))
        for turn in range(chunks.rounds):
            if (batch := chunks.batch(turn)) is not None:
                for name, module in modules.items():
                    sums[name] += eval_step(network, module, batch)[0]
            ask = world.agreed(clock)
            save = save or ask.save
            if ask.stop:
                return None, Ask(save=save, stop=True)
        return {name: Sums.of(world.total(value)) for name, value in sums.items()}, Ask(save=save)
