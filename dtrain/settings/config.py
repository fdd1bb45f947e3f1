"""TrainConfig: all settings of a run as one frozen value, made of panels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.settings import layers
from dtrain.settings.augmentation import Augmentation
from dtrain.settings.data import Data
from dtrain.settings.evaluation import Evaluation
from dtrain.settings.machine import Machine
from dtrain.settings.network import Network
from dtrain.settings.optimization import Optimization
from dtrain.settings.run import Run
from dtrain.settings.values import Panel, Setting, checked, plain, settings_of

PANELS: tuple[type[Panel], ...] = (Network, Optimization, Data, Augmentation, Evaluation, Machine, Run)
SETTINGS: dict[str, Setting] = {s.name: s for panel in PANELS for s in settings_of(panel)}  # in the order of --help


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. A setting is one flag, one key of TOML and one keyword of `of`.

    Only `assembly`, `training` and the commands see all of it; every other function takes the panel that it uses.
    """

    network: Network
    optimization: Optimization
    data: Data
    augmentation: Augmentation
    evaluation: Evaluation
    machine: Machine
    run: Run
    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False, kw_only=True)

    @classmethod
    def of(cls, file: Path | None = None, **flags: Any) -> TrainConfig:
        """The config of these settings, in layers: defaults < recipe < `file` < `flags`. None means not given.

        Values may be given as the command line gives them (text) or in their own types. With the path of a run or of a
        checkpoint as `resume`, and neither a file nor an architecture, the file is that run's own config.toml.
        Raises UsageError for an unknown name or a value that does not fit; PluginError for a broken recipe.
        """
        return cls._from(*layers.combined(SETTINGS, file, flags))

    @classmethod
    def stored(cls, table: Mapping[str, Any]) -> TrainConfig:
        """The config in a run's config.toml or checkpoint: every value as it was, and no recipe is looked up.

        Raises UsageError for a setting that this version of dtrain does not know.
        """
        return cls._from(checked(SETTINGS, table), dict.fromkeys(table, "run"))

    @classmethod
    def elsewhere(cls, table: Mapping[str, Any], here: Mapping[str, Any]) -> TrainConfig:
        """Like `stored`, for looking at a run in a single process, perhaps on another machine.

        here: the device, folders and reader of this machine, which are used in place of the run's own.
        """
        # in a single process synchronised batch norm equals plain batch norm, which a CPU can compute too
        return cls.stored({**table, **here, "backend": "auto", "sync_bn": False})

    @classmethod
    def _from(cls, values: Mapping[str, Any], origins: Mapping[str, str]) -> TrainConfig:
        panels: dict[str, Any] = {panel.attribute: panel.of(values) for panel in PANELS}
        return cls(**panels, origins=origins)

    def value(self, name: str) -> Any:
        """The value of the setting `name`."""
        return getattr(getattr(self, SETTINGS[name].panel.attribute), name)

    def origin(self, name: str) -> str:
        """Which layer the value of the setting `name` came from: default, a recipe, a file, flag, or run."""
        return self.origins.get(name, "default")

    @property
    def by_hand(self) -> frozenset[str]:
        """The settings that were given as flags.

        It is an error if one of these has no effect or does not fit; from a recipe it is ignored or adjusted.
        """
        return frozenset(name for name, origin in self.origins.items() if origin == layers.FLAG)

    def settings(self) -> dict[str, Any]:
        """Every setting as a value of JSON and TOML; None is left out, since TOML has no null.

        The values that came from a recipe are included, so `recipe` itself is "none" and none is applied again.
        """
        values = {name: plain(value) for name in SETTINGS if (value := self.value(name)) is not None}
        return {name: value for name, value in {**values, "recipe": "none"}.items() if value != {}}
