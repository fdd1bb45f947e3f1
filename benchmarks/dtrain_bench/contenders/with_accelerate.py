"""Accelerate: the plain loop, prepared by an Accelerator. `python -m dtrain_bench.contenders.with_accelerate`."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dtrain_bench.contenders.meter import Meter
from dtrain_bench.contenders.networks import build
from dtrain_bench.contenders.task import BATCH_SIZE, LOG_EVERY, SGD, WORKERS, Images, Task, task_from_command_line


def train(task: Task, meter: Meter) -> None:
    """Train until the meter has counted enough steps."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if task.bf16 else "no")
    loader = DataLoader(
        Images(task),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=task.tuned,
    )
    layout = torch.channels_last if task.tuned else torch.contiguous_format
    read = Tensor.detach if task.tuned else Tensor.item
    network = build(task.network).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), **SGD, fused=task.tuned)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    network.train()
    while True:
        loss_sum: Tensor | float = 0.0
        hits: Tensor | float = 0
        for step, (images, labels) in enumerate(loader, 1):
            images = images.to(memory_format=layout)
            optimizer.zero_grad()
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
            accelerator.backward(loss)
            optimizer.step()

            loss_sum += read(loss)
            hits += read((logits.argmax(1) == labels).sum())
            if step % LOG_EVERY == 0:
                accelerator.print(f"step {step}: loss {loss_sum / step:.4f}, accuracy {hits / (step * BATCH_SIZE):.4f}")
            if meter.count(loss):
                return


if __name__ == "__main__":
    given = task_from_command_line()
    stopwatch = Meter(given.warmup, given.steps, BATCH_SIZE)
    train(given, stopwatch)
    print(stopwatch.report())
