"""`dtrain train --dry-run`: everything a run would begin with, and no run."""

from __future__ import annotations

import torch

from dtrain import runtime
from dtrain.config import TrainConfig
from dtrain.data.dataset import load_dataset
from dtrain.model.network import build_module
from dtrain.model.optimization import build_optimizer
from dtrain.model.rehearsal import first_output, noise, smallest_size_told
from dtrain.plan import make_plan
from dtrain.run.console import Console
from dtrain.world import place

FIRST_STEPS = 5


def dry_run(config: TrainConfig) -> None:
    """Print plan, shapes, parameters, memory and first rates. Converts the data set if it must; trains nothing."""
    at, console = place(), Console(place().is_main)
    machine = runtime.decide(config, local_rank=at.local_rank, local_world=at.local_size)
    dataset = console.converting(
        load_dataset(
            config.dataset,
            data_dir=config.data_dir,
            cache_dir=config.cache_dir,
            conversion=config.conversion(),
            arch=config.arch,
            channels=config.channels,
            val_split=config.val_split,
            seed=config.seed,
        )
    )
    plan = make_plan(config, train_size=len(dataset.train_samples), world_size=at.size)
    size, channels, classes = dataset.image_size, dataset.channels, len(dataset.train.class_names)

    def build(pixels: int) -> torch.nn.Module:
        return build_module(config, num_classes=classes, in_channels=channels, image_size=pixels)

    with smallest_size_told(build, channels, size):
        module = build(size)
        images = noise(config.seed, (2, channels, size, size), torch.float32, channels_last=config.channels_last)
        first_output(module, images, config.arch, classes)
    optimizer = build_optimizer(config, module)
    parameters = sum(p.numel() for p in module.parameters())
    decayed = sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    for line in (*machine.why, *plan.lines(config.lr)):
        console.line(line)
    console.table(
        "dry run",
        [
            ("images", f"[{plan.micro_batch}, {channels}, {size}, {size}] {machine.amp_dtype}"),
            ("logits", f"[{plan.micro_batch}, {classes}]"),
            ("parameters", f"{parameters:,} ({decayed:,} with two dimensions or more)"),
            ("weights and gradients", f"{8 * parameters / 2**20:.1f} MiB"),
            ("optimizer", f"{config.opt}, {len(optimizer.param_groups)} groups"),
            (
                "first rates",
                ", ".join(f"{config.lr * plan.lr_factor(k * plan.batch_size):.4g}" for k in range(FIRST_STEPS)),
            ),
        ],
    )
