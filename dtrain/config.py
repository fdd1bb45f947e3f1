"""Being moved: the names of dtrain/settings/, for the rooms that still ask for them here."""

from __future__ import annotations

from typing import Any

import dtrain.settings as settings
from dtrain.settings import SETTINGS
from dtrain.settings.data import LARGEST_SIZE, OWN_SIZE, Conversion
from dtrain.settings.layers import CHECKPOINTS, RUN_CONFIG, read_config


class TrainConfig(settings.TrainConfig):
    def __new__(cls, **values: Any) -> Any:
        return settings.TrainConfig.of(recipe="none", **values)

    of = settings.TrainConfig.of  # type: ignore[assignment]
    stored = settings.TrainConfig.stored  # type: ignore[assignment]
    elsewhere = settings.TrainConfig.elsewhere  # type: ignore[assignment]


def coerced(name: str, value: Any) -> Any:
    return SETTINGS[name].value(value)


__all__ = [
    "CHECKPOINTS",
    "LARGEST_SIZE",
    "OWN_SIZE",
    "RUN_CONFIG",
    "Conversion",
    "TrainConfig",
    "coerced",
    "read_config",
]
