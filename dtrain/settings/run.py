"""Settings of the run as a whole: seed, run directory, checkpoints, log and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dtrain.errors import UsageError
from dtrain.settings.values import Every, Panel, Span, above, at_least, setting


@dataclass(frozen=True)
class Run(Panel):
    """Which run it is, where it is kept, when it is saved and stopped, and where its metrics are reported."""

    title: ClassVar[str] = "Run"
    attribute: ClassVar[str] = "run"

    seed: int = setting(
        0,
        "seed: determines the initial weights, the order of the samples, the augmentation and dropout",
        at_least(0),
    )
    recipe: str | None = setting(
        None,
        "recipe: a named set of settings to start from, which other flags override; none starts from the defaults of "
        "this list [default: the recipe of the architecture and data set, if there is one]",
        place=True,
    )
    output: Path | None = setting(
        None, "run directory [default: runs/<arch>-<dataset>-<digest of the settings>]", place=True
    )
    name: str | None = setting(None, "name of the run directory under runs/ [default: see --output]", place=True)
    resume: str = setting(
        "auto",
        "auto continues the run in the run directory from its last checkpoint, or starts it if there is none; none "
        "starts a new run; the path of a run directory or checkpoint continues from there",
        place=True,
    )
    checkpoint_every: Every = setting(
        Every(epochs=1), "how often to save a checkpoint: 500steps, 1epoch, 10min, or end", place=True
    )
    keep: int = setting(
        2, "number of checkpoints to keep in addition to the last and the best one", at_least(0), place=True
    )
    log_interval: int = setting(50, "number of steps between two log lines", above(0), place=True)
    track: tuple[str, ...] = setting(
        (),
        "trackers that the metrics are sent to, comma-separated, such as wandb,tensorboard,csv [default: none]",
        place=True,
    )
    max_time: Span | None = setting(
        None,
        "save a checkpoint and stop after this much time, such as 90s, 45min or 2h [default: no limit]",
        place=True,
    )

    def check(self) -> None:
        """Raise UsageError if the name is a path."""
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise UsageError(f"--name {self.name}: give a plain name; --output takes a path")
