"""The layers that values come from: defaults < recipe < `--config FILE` < flags. A later layer wins.

A setting may depend on another one (`of` in its line). Where a layer chooses another optimizer, for instance, the
learning rate, the momentum and the optimizer's options of the layers below it are dropped, since those of a recipe were
meant for the recipe's optimizer.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import PluginError, UsageError
from dtrain.plugins import find_recipe, read_recipe, recipe_for
from dtrain.settings.data import Data
from dtrain.settings.values import Setting, checked

FLAG = "flag"
RUN_CONFIG, CHECKPOINTS = "config.toml", "checkpoints"  # in a run directory; dtrain/run/ writes them
Settings = Mapping[str, Setting]


def combined(settings: Settings, file: Path | None, flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of all layers by name, and the layer that each came from; see `TrainConfig.of`.

    settings: all settings that exist, by name.
    """
    given = checked(settings, {name: value for name, value in flags.items() if value is not None})
    if file is None and "arch" not in given:
        file = _config_of_run(given.get("resume", "auto"))
    from_file = _from_file(settings, Path(file)) if file is not None else {}
    if {"epochs", "steps"} <= given.keys():
        raise UsageError("--epochs and --steps: both say how long to train; give one of them")
    asked = {**from_file, **given}
    name = asked.get("recipe") or recipe_for(asked.get("arch", ""), dataset_name(asked.get("dataset")))
    layers: list[tuple[str, Mapping[str, Any]]] = [(str(file), from_file), (FLAG, given)]
    if name not in (None, "none"):
        layers.insert(0, (f"recipe {name}", _from_recipe(settings, name)))
        # the lowest layer: it only shows where the recipe's name came from if no other layer gives it
        layers.insert(0, ("architecture and data set", {"recipe": name}))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for left in _left_behind(settings, values, layer):
            values.pop(left, None)
            origins.pop(left, None)
        for name, value in layer.items():
            # options of one table add up over the layers: --arch-opt dropout=true keeps the recipe's norm=batch
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
            origins[name] = origin
    return values, origins


def _from_file(settings: Settings, file: Path) -> dict[str, Any]:
    table = read_config(file)
    try:
        return checked(settings, table)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def _left_behind(settings: Settings, values: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    """The settings to drop, because `layer` chooses something else for a setting that they depend on."""

    # naming the same plugin again drops nothing; giving --epochs again drops --steps, even if the number is the same
    def kept(name: str) -> bool:
        before = values.get(name, settings[name].default)
        return isinstance(layer[name], str) and _bare(layer[name]) == _bare(before)

    return [
        name for name, known in settings.items() if known.of is not None and known.of in layer and not kept(known.of)
    ]


def _bare(name: str) -> str:
    """A plugin's name without its distribution."""
    return name.rpartition("::")[2]


def _from_recipe(settings: Settings, name: str) -> dict[str, Any]:
    """The settings of a recipe. Raises PluginError, which names its distribution, if one of them is not valid."""
    recipe = find_recipe(name)
    try:
        return checked(settings, read_recipe(recipe))
    except PluginError:
        raise
    except UsageError as error:
        raise PluginError(f"recipe {recipe.name} of {recipe.distribution}: {error}") from None


def _config_of_run(resume: str) -> Path | None:
    """The config.toml of the run that `--resume PATH` names; None if `resume` is "auto" or "none"."""
    if resume in ("auto", "none"):
        return None
    path = Path(resume)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if not (run / RUN_CONFIG).is_file():
        raise UsageError(f"--resume {resume}: no run is there; give a run directory, auto or none")
    return run / RUN_CONFIG


def read_config(path: Path) -> dict[str, Any]:
    """The table of a TOML file such as a run's config.toml. Raises UsageError naming the file and what is wrong."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give a TOML file such as a run's config.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not TOML: {error}") from None


def dataset_name(dataset: str | None) -> str:
    """A data set's name for recipes and run directories; of a path, its last part without endings."""
    text = Data.dataset if dataset is None else dataset
    return Path(text).name.split(".")[0] if "/" in text or "." in text else text
