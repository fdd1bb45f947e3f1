"""dtrain: train image classifiers; stop anywhere, resume bit for bit, on any number of processes.

    from dtrain import TrainConfig, train
    summary = train(TrainConfig.of(arch="allcnn_c", dataset="digits"))

Importing dtrain imports nothing heavy; the names below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.assembly import load_network
    from dtrain.settings.config import TrainConfig
    from dtrain.training import train

__all__ = ["TrainConfig", "load_network", "train"]
__version__ = "0.1.0"

_HOMES = {"TrainConfig": "dtrain.settings.config", "train": "dtrain.training", "load_network": "dtrain.assembly"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
