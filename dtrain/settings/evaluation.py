"""Settings of the evaluations during a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtrain.settings.values import Every, Panel, above, setting, within, without_clock


@dataclass(frozen=True)
class Evaluation(Panel):
    """How often a run is evaluated, in batches of which size, and at which accuracy it ends early."""

    title: ClassVar[str] = "Evaluation"
    attribute: ClassVar[str] = "evaluation"

    eval_batch_size: int = setting(
        500,
        "images in one batch of an evaluation; the batches are the same for any number of processes, and so are the "
        "results",
        above(0),
    )
    eval_every: Every = setting(Every(epochs=1), "how often to evaluate: 500steps, 1epoch, or end", without_clock)
    stop_at_accuracy: float | None = setting(
        None,
        "end the run as soon as an evaluation reaches this top-1 accuracy, a fraction such as 0.94 [default: never]",
        within("(0, 1]"),
    )
