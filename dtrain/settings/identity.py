"""Which settings make a run what it is: what a resume must find again, and what the run directory is named after."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import UsageError
from dtrain.files import canonical_json
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.layers import CHECKPOINTS, RUN_CONFIG, dataset_name
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


def run_path(config: TrainConfig) -> Path:
    """The run directory that `config` names. With `--resume none` the run may get `<it>-2` or a later one instead."""
    if config.run.resume not in ("auto", "none"):
        given = Path(config.run.resume)
        return given.parent.parent if given.parent.name == CHECKPOINTS else given
    return config.run.output or Path("runs") / run_name(config)


def check_resume(config: TrainConfig) -> None:
    """Raise UsageError where `--resume PATH` names another directory than `--output`, or a checkpoint set aside."""
    if config.run.resume in ("auto", "none"):
        return
    path, asked, output = run_path(config), Path(config.run.resume), config.run.output
    own = Path(config.origin("output")).resolve() == (path / RUN_CONFIG).resolve()  # where the run stood when it began
    if output is not None and not own and output.resolve() != path.resolve():
        raise UsageError(
            f"--resume {asked} --output {output}: a run goes on in its own directory; leave --output out, or "
            "begin a new run there without --resume"
        )
    if asked.parent.name == CHECKPOINTS and (name := asked.name.partition(".")[0]) != asked.name:
        taken = f"move {name} away, then " if (asked.parent / name).exists() else ""
        raise UsageError(
            f"--resume {asked}: this checkpoint has been set aside; to go on from it, {taken}rename it to {name} and "
            "resume from that"
        )


WHERE = ("output", "name", "resume", "recipe")  # how a run is found, and no part of it


def differing(was: TrainConfig, asked: TrainConfig) -> list[str]:
    """The settings in which two configs differ and which shape the numbers: a resume refuses them."""
    return [name for name, known in SETTINGS.items() if not known.place and was.value(name) != asked.value(name)]
