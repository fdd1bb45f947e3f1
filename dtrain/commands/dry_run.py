"""`dtrain train --dry-run`: prints what a run would do, and does not train."""

from __future__ import annotations

from dtrain import assembly
from dtrain.model.groups import group_rows
from dtrain.model.optimization import build_optimizer
from dtrain.run.console import Console
from dtrain.settings.config import TrainConfig
from dtrain.world import World, place

FIRST_STEPS = 5


def dry_run(config: TrainConfig) -> None:
    """Print the plan, input and output shapes, the parameter groups, memory and the first learning rates.

    Converts the data set if needed. Raises what a run would raise before its first step.
    """
    at, alone = place(), World.alone()
    console = Console(at.is_main)
    assembly.check(config, at.size)
    machine = assembly.machine_of(config, at)
    dataset = assembly.dataset_of(config, console)
    plan = assembly.plan_of(config, **dataset.sizes, world_size=at.size)
    module, head = assembly.built_network(config, dataset, plan, alone, console)
    groups, choice = assembly.groups_for(config, module, head), assembly.choice_of(config)
    optimizer = build_optimizer(choice, groups, module)
    parameters = sum(p.numel() for p in module.parameters())
    rates = [choice.lr * plan.at(step).lr_factor for step in range(min(FIRST_STEPS, plan.total_steps))]
    channels = dataset.channels
    for line in (*machine.why, *dataset.left_out, *plan.lines(assembly.rate_told(config))):
        console.line(line)
    console.table(
        "dry run",
        [
            *(("images", f"[{n}, {channels}, {side}, {side}] {machine.amp_dtype}") for n, side in plan.shapes),
            ("logits", f"[{plan.largest_micro_batch}, {len(dataset.train.class_names)}]"),
            ("parameters", f"{parameters:,}"),
            ("weights and gradients", f"{8 * parameters / 2**20:.1f} MiB"),
            ("optimizer", config.optimization.opt),
            *group_rows(optimizer, groups, module),
            ("first rates", ", ".join(f"{rate:.4g}" for rate in rates)),
        ],
    )
