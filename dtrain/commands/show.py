"""Prints tables of plugins, settings, runs and the like, as text or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dtrain.plugins import Kind, Plugin, listed, recipes
from dtrain.run.console import aligned
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.values import plain


def plugin_rows(kind: Kind) -> list[dict[str, Any]]:
    """A row for each plugin of a kind, with its name and where it comes from. Imports none of them."""
    return [_row(plugin) for plugin in listed(kind)]


def recipe_rows() -> list[dict[str, Any]]:
    """A row for each recipe, with its file. Imports no package and reads no recipe."""
    return [_row(recipe) for recipe in recipes()]


def _row(plugin: Plugin) -> dict[str, Any]:
    # `member` is left out, because the name of a family, `family/*`, shows it
    return {name: value for name, value in asdict(plugin).items() if name != "member"}


def config_rows(config: TrainConfig) -> list[dict[str, Any]]:
    """A row for each setting, with its value and where the value comes from."""
    return [{"setting": name, "value": _shown(config.value(name)), "from": config.origin(name)} for name in SETTINGS]


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items())
    value = value if value is None else plain(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print rows, which all have the same keys, in columns with the keys as heading; or as a JSON list."""
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    if not rows:
        print(f"no {title}")
        return
    names = list(rows[0])
    print(*aligned([names, *(["" if row[name] is None else row[name] for name in names] for row in rows)]), sep="\n")


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one fact in each line; or all as a JSON object."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(*aligned(list(facts.items())), sep="\n")
