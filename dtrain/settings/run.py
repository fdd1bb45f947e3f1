"""Which run it is, where it is kept, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dtrain.errors import UsageError
from dtrain.settings.values import Every, Panel, Span, above, at_least, setting


@dataclass(frozen=True)
class Run(Panel):
    """Seed, run directory, checkpoints, log and trackers."""

    title: ClassVar[str] = "Run"
    attribute: ClassVar[str] = "run"

    seed: int = setting(
        0, "integer that determines the order of samples, augmentation, dropout and initial weights", at_least(0)
    )
    recipe: str | None = setting(
        None,
        "named settings to start from; none takes the bare defaults [default: the recipe of the architecture and data "
        "set, if there is one]",
        place=True,
    )
    output: Path | None = setting(
        None, "run directory [default: runs/<arch>-<dataset>-<digest of the settings>]", place=True
    )
    name: str | None = setting(None, "name of the run directory under runs/", place=True)
    resume: str = setting(
        "auto",
        "auto continues this run where it stopped; none starts a new one; a path continues that run or checkpoint",
        place=True,
    )
    checkpoint_every: Every = setting(
        Every(epochs=1), "how often to save a checkpoint: 500steps, 1epoch, 10min, or end", place=True
    )
    keep: int = setting(2, "number of checkpoints to keep beside the last and the best", at_least(0), place=True)
    log_interval: int = setting(50, "steps between two log lines", above(0), place=True)
    track: tuple[str, ...] = setting(
        (), "trackers that the curves are sent to, comma-separated, such as wandb,tensorboard,csv", place=True
    )
    max_time: Span | None = setting(None, "save a checkpoint and stop after this long: 90s, 45min, 2h", place=True)

    def check(self) -> None:
        """A name is no path."""
        if self.name is not None and (not self.name or Path(self.name).name != self.name):
            raise UsageError(f"--name {self.name}: give a plain name; --output takes a path")
