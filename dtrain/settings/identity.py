"""Which settings make a run what it is: what a resume must find again, and what the run directory is named after."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.files import canonical_json
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.layers import dataset_name
from dtrain.settings.values import plain


def results(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape the numbers and differ from their defaults, as values of JSON.

    A setting that a later version adds, with a default that means what went before, changes none of this. So the same
    command finds its run again after an upgrade; tests/test_identity.py holds the names of ten commands.
    """
    return {
        name: plain(config.value(name))
        for name, known in SETTINGS.items()
        if not known.place and config.value(name) != known.default
    }


def digest(config: TrainConfig, inputs: Mapping[str, str] | None = None) -> str:
    """Eight hex digits of `results` and of the run's inputs (digests of files that it starts from, by name)."""
    shaping = {**results(config), **({"inputs": dict(inputs)} if inputs else {})}
    return hashlib.sha256(canonical_json(shaping)).hexdigest()[:8]


def run_name(config: TrainConfig) -> str:
    """The run directory's name under runs/, unless the user gives one: architecture, data set, digest."""
    arch = config.network.arch
    arch = Path(arch).name.replace(".py:", "-") if ".py:" in arch else arch
    arch = re.sub(r"[^\w.-]+", "-", arch).strip("-.")
    return config.run.name or f"{arch}-{dataset_name(config.data.dataset)}-{digest(config)}"


def differing(was: TrainConfig, asked: TrainConfig) -> list[str]:
    """The settings in which two configs differ and which shape the numbers: a resume refuses them."""
    return [name for name, known in SETTINGS.items() if not known.place and was.value(name) != asked.value(name)]
