"""All of a run that learns, saved and restored as one: network, optimizer, loss scaler, EMA, and what is frozen."""

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
    """What a checkpoint of a run's learning holds; `restore` brings it back to where `parts` and `counts` were taken.

    ema: the average of the weights, None without --ema. frozen: what --freeze keeps from being trained until an epoch.
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
        """Go back to a checkpoint's `parts` and to what `counts` returned then.

        Raises UsageError where they are another network's, StorageError where they are another optimizer's or hold a
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
    """The network and its optimizer with a loss scaler, which float16 needs.

    ema: the decay of the average, None for none. until: what is frozen for how long (`groups.frozen_until`).
    """
    scaler = torch.amp.GradScaler(network.device.type, enabled=network.dtype == torch.float16)
    average = Average(network.module, ema) if ema is not None else None
    return Learner(network, optimizer, scaler, average, Frozen(network.module, until))
