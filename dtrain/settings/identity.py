"""Which settings determine the results of a run. A resume must not change them, and the run directory is named by them.

The name holds a digest of these settings, so the same command finds its own run again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.errors import UsageError, nearest
from dtrain.files import canonical_json
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.layers import CHECKPOINTS, RUN_CONFIG, dataset_name
from dtrain.settings.values import plain


def results(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine the results and differ from their defaults, as JSON values.

    A new setting whose default keeps the behaviour from before it existed changes nothing here. So the same
    command finds its run again after an upgrade; tests/test_identity.py pins the names of ten commands.
    """
    return {
        name: plain(config.value(name))
        for name, known in SETTINGS.items()
        if not known.place and config.value(name) != known.default
    }


def digest(config: TrainConfig, inputs: Mapping[str, str] | None = None) -> str:
    """The first eight hex digits of the SHA-256 of `results` and of the run's inputs.

    inputs: the digests of the files that the run starts from, by name.
    """
    shaping = {**results(config), **({"inputs": dict(inputs)} if inputs else {})}
    return hashlib.sha256(canonical_json(shaping)).hexdigest()[:8]


def run_name(config: TrainConfig) -> str:
    """The run directory's name under runs/, unless the user gives one: architecture, data set, digest."""
    arch = config.network.arch
    arch = Path(arch).name.replace(".py:", "-") if ".py:" in arch else arch
    arch = re.sub(r"[^\w.-]+", "-", arch).strip("-.")
    return config.run.name or f"{arch}-{dataset_name(config.data.dataset)}-{digest(config)}"


def run_path(config: TrainConfig) -> Path:
    """The run directory that `config` names.

    With `--resume none`, where that directory is in use already, the run gets the first free one of `<path>-2`,
    `<path>-3` and so on instead; see `rundir.open_run`.
    """
    if config.run.resume not in ("auto", "none"):
        given = Path(config.run.resume)
        return given.parent.parent if given.parent.name == CHECKPOINTS else given
    return config.run.output or Path("runs") / run_name(config)


def check_resume(config: TrainConfig) -> None:
    """Raise UsageError if `--resume PATH` and `--output` name different directories, or PATH a renamed checkpoint.

    A checkpoint is renamed, with a word such as `.undone` at the end, when it is damaged or replaced by an older one.
    """
    if config.run.resume in ("auto", "none"):
        return
    path, asked, output = run_path(config), Path(config.run.resume), config.run.output
    own = Path(config.origin("output")).resolve() == (path / RUN_CONFIG).resolve()  # where the run stood when it began
    if output is not None and not own and output.resolve() != path.resolve():
        raise UsageError(
            f"--resume {asked} --output {output}: a run goes on in its own directory; leave --output out, or "
            "begin a new run there without --resume"
        )
    if asked.parent.name == CHECKPOINTS and not asked.is_dir():
        there = sorted(folder.name for folder in asked.parent.glob("step-*")) if asked.parent.is_dir() else []
        raise UsageError(f"--resume {asked}: no such checkpoint; {nearest(asked.name, there)}")
    if asked.parent.name == CHECKPOINTS and (name := asked.name.partition(".")[0]) != asked.name:
        taken = f"move {name} away, then " if (asked.parent / name).exists() else ""
        raise UsageError(
            f"--resume {asked}: this checkpoint has been set aside; to go on from it, {taken}rename it to {name} and "
            "resume from that"
        )


WHERE = ("output", "name", "resume", "recipe")  # settings that say which run directory is meant, and are no part of it


def differing(was: TrainConfig, asked: TrainConfig) -> list[str]:
    """The settings that determine the results and differ between two configs; a resume refuses to change them."""
    return [name for name, known in SETTINGS.items() if not known.place and was.value(name) != asked.value(name)]
