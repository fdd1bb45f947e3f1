"""`dtrain train --dry-run`: prints what a run would start with, and trains nothing."""

from __future__ import annotations

import torch

from dtrain import runtime
from dtrain.config import TrainConfig
from dtrain.data.dataset import load_dataset
from dtrain.model.network import build_module
from dtrain.model.optimization import build_optimizer
from dtrain.model.rehearsal import first_output, noise, smallest_size_told
from dtrain.run.console import Console
from dtrain.training import plan_of
from dtrain.world import place

FIRST_STEPS = 5


def dry_run(config: TrainConfig) -> None:
    """Print the plan, the shapes of inputs and outputs, the parameters, the memory they need and the first rates.

    Converts the data set if that has not been done. Raises what a run would raise before its first step.
    """
    at, console = place(), Console(place().is_main)
    machine = runtime.decide(config.machine, local_rank=at.local_rank, local_world=at.local_size)
    dataset = dataset_of(config, console)
    plan = plan_of(config, dataset, at.size)
    size, channels, classes = dataset.image_size, dataset.channels, len(dataset.train.class_names)

    def build(pixels: int) -> torch.nn.Module:
        return build_module(config, num_classes=classes, in_channels=channels, image_size=pixels)

    with smallest_size_told(build, channels, plan.image_sizes[0]):
        module = build(size)
        for side in plan.image_sizes:
            shape, last = (2, channels, side, side), config.machine.channels_last
            images = noise(config.run.seed, shape, torch.float32, channels_last=last)
            first_output(module, images, config.network.arch, classes)
    optimizer = build_optimizer(config, module)
    parameters = sum(p.numel() for p in module.parameters())
    decayed = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    first_steps = range(min(FIRST_STEPS, plan.total_steps))
    for line in (*machine.why, *plan.lines(config.lr)):
        console.line(line)
    console.table(
        "dry run",
        [
            *(("images", f"[{n}, {channels}, {side}, {side}] {machine.amp_dtype}") for n, side in plan.shapes),
            ("logits", f"[{plan.largest_micro_batch}, {classes}]"),
            ("parameters", f"{parameters:,} ({decayed:,} with two dimensions or more)"),
            ("weights and gradients", f"{8 * parameters / 2**20:.1f} MiB"),
            ("optimizer", f"{config.opt}, {len(optimizer.param_groups)} groups"),
            (
                "first rates",
                ", ".join(f"{config.lr * plan.at(step).lr_factor:.4g}" for step in first_steps),
            ),
        ],
    )
