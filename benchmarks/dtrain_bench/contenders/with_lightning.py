"""Lightning: a LightningModule and a Trainer. `python -m dtrain_bench.contenders.with_lightning`."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dtrain_bench.contenders.meter import Meter
from dtrain_bench.contenders.networks import build
from dtrain_bench.contenders.task import BATCH_SIZE, SGD, WORKERS, Images, Task, task_from_command_line


class Classifier(L.LightningModule):  # type: ignore[misc]  # untyped where Lightning is not installed
    """The network, its loss and its optimizer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.layout = torch.channels_last if task.tuned else torch.contiguous_format
        self.fused = task.tuned
        self.network = build(task.network).to(memory_format=self.layout)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute and log the loss and the accuracy of a batch."""
        images, labels = batch
        logits = self.network(images.to(memory_format=self.layout))
        loss = F.cross_entropy(logits, labels)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with the settings of the task."""
        return torch.optim.SGD(self.parameters(), **SGD, fused=self.fused)


class Count(L.Callback):  # type: ignore[misc]  # as above
    """Has the meter count each step."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step that is done."""
        self.meter.count(outputs["loss"])


def train(task: Task, meter: Meter) -> None:
    """Train for the steps that the meter counts."""
    L.seed_everything(0)
    loader = DataLoader(
        Images(task),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=task.tuned,
    )
    settings: dict[str, Any] = {}
    if task.tuned:
        settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        settings["precision"] = "bf16-mixed" if task.bf16 else "32-true"
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=task.warmup + task.steps, callbacks=[Count(meter)], **settings
    )
    trainer.fit(Classifier(task), loader)


if __name__ == "__main__":
    given = task_from_command_line()
    stopwatch = Meter(given.warmup, given.steps, BATCH_SIZE)
    train(given, stopwatch)
    print(stopwatch.report())
