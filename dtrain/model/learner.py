"""The state of learning, saved and restored as one: network, optimizer, loss scaler and EMA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UsageError
from dtrain.files import refuse_unknown_keys
from dtrain.model.groups import Frozen
from dtrain.model.network import Average, Network
from dtrain.model.optimization import Packed, pack, unpack

NOTHING_FROZEN = Frozen(nn.Module(), {})


@dataclass(frozen=True)
class Learner:
    """The network with all that changes with it in training. A checkpoint holds its `parts` and `counts`.

    scaler: the loss scaler, which is active for float16 only. ema: the moving average of the weights; None without
    --ema. frozen: what --freeze keeps from being trained until an epoch.
    """

    network: Network
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Average | None
    frozen: Frozen = NOTHING_FROZEN

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors themselves, not copies, by part ("network", "optimizer", "ema") and name: one file a part."""
        parts = {"network": self.network.tensors(), "optimizer": pack(self.optimizer, self.network.module).tensors}
        return parts if self.ema is None else {**parts, "ema": dict(self.ema.module.state_dict())}

    def counts(self) -> dict[str, Any]:
        """All state that is not in a tensor, in types that JSON has."""
        return {
            "optimizer": pack(self.optimizer, self.network.module).scalars,
            "scaler": self.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema is not None else 0,
        }

    def restore(self, parts: Mapping[str, Mapping[str, Tensor]], counts: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint from its `parts` and `counts`.

        Raises UsageError if they belong to another network, StorageError if they belong to another optimizer or hold a
        count that this version of dtrain does not know.
        """
        refuse_unknown_keys("state.json", counts, self.counts())
        packed = Packed(dict(parts.get("optimizer", {})), counts["optimizer"])
        try:
            self.network.load(parts["network"])
        except RuntimeError as error:  # torch's: names or shapes differ
            raise UsageError(
                "the network is not the one that this run began with "
                f"({' '.join(str(error).split())[:200]}); bring it back, or give another --output"
            ) from error
        unpack(self.optimizer, self.network.module, packed)
        self.scaler.load_state_dict(counts["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(dict(parts["ema"]))
            self.ema.updates = counts["ema_updates"]


def learner_of(
    network: Network, optimizer: torch.optim.Optimizer, *, ema: float | None = None, until: Mapping[str, float]
) -> Learner:
    """A learner of this network and optimizer, with a new loss scaler and EMA.

    ema: the decay of the EMA; None for no EMA. until: the epoch until which each parameter is frozen; see
    `groups.frozen_until`.
    """
    scaler = torch.amp.GradScaler(network.device.type, enabled=network.dtype == torch.float16)
    average = Average(network.module, ema) if ema is not None else None
    return Learner(network, optimizer, scaler, average, Frozen(network.module, until))
