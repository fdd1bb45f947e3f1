"""`dtrain train --dry-run`: everything a run would begin with, and no run."""

from __future__ import annotations

import torch

from dtrain import runtime
from dtrain.config import TrainConfig
from dtrain.data.dataset import load_dataset
from dtrain.model.groups import group_rows
from dtrain.model.network import layout, mode_told
from dtrain.model.rehearsal import noise, smallest_size_told
from dtrain.plan import make_plan
from dtrain.run.console import Console
from dtrain.training import groups_of, module_of, optimizer_of, prepare
from dtrain.world import place

FIRST_STEPS = 5


def dry_run(config: TrainConfig) -> None:
    """Print plan, shapes, parameters, memory and first rates. Converts the data set if it must; trains nothing."""
    at, console = place(), Console(place().is_main)
    machine = runtime.decide(config, local_rank=at.local_rank, local_world=at.local_size)
    dataset = console.converting(load_dataset(config))
    plan = make_plan(config, train_size=len(dataset.train_samples), world_size=at.size)
    size, channels, classes = dataset.image_size, dataset.channels, len(dataset.train.class_names)

    def build(pixels: int) -> torch.nn.Module:
        return module_of(config, num_classes=classes, in_channels=channels, image_size=pixels)

    with smallest_size_told(build, channels, size):
        module = build(size)
        images = noise(config.seed, (2, channels, size, size), torch.float32, layout(config.channels_last))
        told_mode = mode_told(module, config.arch)
        head = prepare(config, module, images, classes)
    groups = groups_of(config, module, head)
    optimizer = optimizer_of(config, module, groups)
    parameters = sum(p.numel() for p in module.parameters())
    if told_mode is not None:
        console.warn(told_mode)
    for line in (*machine.why, *plan.lines(config.lr)):
        console.line(line)
    console.table(
        "dry run",
        [
            ("images", f"[{plan.micro_batch}, {channels}, {size}, {size}] {machine.amp_dtype}"),
            ("logits", f"[{plan.micro_batch}, {classes}]"),
            ("parameters", f"{parameters:,}"),
            ("weights and gradients", f"{8 * parameters / 2**20:.1f} MiB"),
            ("optimizer", config.opt),
            *group_rows(optimizer, groups, module),
            (
                "first rates",
                ", ".join(f"{config.lr * plan.lr_factor(k * plan.batch_size):.4g}" for k in range(FIRST_STEPS)),
            ),
        ],
    )
