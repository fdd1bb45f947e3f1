"""`dtrain replay RUN --step K`: one step of a run, rebuilt and looked at alone.

The step that rows and the console call K is computed again, in one process, from the newest checkpoint before it: the
run's samples, augmentation and dropout, share by share as its processes had them. Nothing is written into the run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain import runtime
from dtrain.commands.contact_sheet import Tile, contact_sheet
from dtrain.config import TrainConfig
from dtrain.data.dataset import DataSet, load_dataset
from dtrain.data.loader import Batch, Loader
from dtrain.errors import StorageError, UsageError
from dtrain.model.learner import Learner
from dtrain.model.network import layout
from dtrain.model.nonfinite import Before
from dtrain.model.optimization import set_lr
from dtrain.model.rehearsal import noise
from dtrain.model.step import StepOptions, backward, seed_step, update
from dtrain.plan import Plan, make_plan
from dtrain.run import checkpoint
from dtrain.run.console import Console
from dtrain.run.recorder import refuse_other_data
from dtrain.run.rundir import read_record, read_rows
from dtrain.run.state import TrainState
from dtrain.training import learner_for, module_of, network_of, prepare

Pixels = npt.NDArray[np.uint8]
SHOWN, PICTURES = 10, 256  # samples that are listed, and at most drawn


@dataclass(frozen=True)
class Replayer:
    """A run's learner at `state`, able to go on by its own steps in this process alone."""

    config: TrainConfig
    plan: Plan  # of the run, with its own number of processes
    dataset: DataSet
    learner: Learner
    state: TrainState
    loader: Loader  # of whole global batches
    options: StepOptions

    def gradient(self, batch: Batch) -> tuple[Tensor, Before]:
        """Compute the gradient of this step; returns the losses of the global batch, and the buffers before it.

        Each process's share by itself: with its own draws, from one set of buffers, of which rank 0's remain.
        """
        learner, network, plan = self.learner, self.learner.network, self.plan
        learner.optimizer.zero_grad(set_to_none=True)
        learner.frozen.hold(plan.epoch_at(self.state.step))
        set_lr(learner.optimizer, plan.lr_factor(self.state.samples))
        before, losses = Before(network.module.buffers()), []
        always = torch.ones((), dtype=torch.bool, device=network.device)
        for rank in reversed(range(plan.world_size)):
            before.put_back(always)
            seed_step(self.config.seed, self.state.step, rank)
            share = slice(rank * plan.share, (rank + 1) * plan.share)
            part = Batch(batch.images[share], batch.labels[share], batch.indices[share], batch.checksum)
            losses.append(backward(network, learner.scaler, part, self.options, shares=plan.world_size)[1])
        return torch.cat(losses[::-1]), before

    def apply(self, buffers: Before) -> bool:
        """The update from the gradient that is there, as the run made it; whether it was skipped."""
        learner = self.learner
        skipped = update(learner, self.options, buffers, self.plan.epoch_at(self.state.step))
        self.state.advance(self.plan.batch_size)
        return bool(skipped)


def replay(run: Path, step: int, out: Path | None, here: Mapping[str, Any]) -> dict[str, Any]:
    """Compute step `step` of `run` again and write its pictures to `out` (default: replay-RUN-STEP here).

    here: settings in place of the run's own, such as its device and folders.
    Returns what `print_replay` shows. Raises UsageError for a step that cannot be reached, DataError where the data
    set is no longer that of the run. Costs the steps since the newest checkpoint before it.
    """
    out = out or Path(f"replay-{run.resolve().name}-{step:08d}")
    if out.resolve().is_relative_to(run.resolve()):
        raise UsageError(f"--out {out}: lies in the run, into which nothing is written; give another folder")
    saved = _newest_before(run, step)
    config = TrainConfig.elsewhere(saved.about["config"], here)
    record = read_record(run)
    resolved = dict(record.resolved) if record is not None else {}
    world_size = _processes_at(run, step) or int(resolved.get("world_size", 1))
    machine = runtime.decide(config, local_rank=0, local_world=1, kept=resolved)
    runtime.apply(machine, deterministic=config.deterministic)
    dataset = Console(False).converting(load_dataset(config))
    refuse_other_data(config.dataset, was=saved.about, asked=dataset.facts)
    plan = make_plan(config, train_size=len(dataset.train_samples), world_size=world_size)
    if not 0 < step <= plan.total_steps:
        raise UsageError(f"--step {step}: this run has the steps 1 to {plan.total_steps}")
    classes, size = len(dataset.train.class_names), dataset.image_size
    module = module_of(config, num_classes=classes, in_channels=dataset.channels, image_size=size)
    images = noise(config.seed, (2, dataset.channels, size, size), torch.float32, layout(config.channels_last))
    head = prepare(config, module, images, classes)
    learner = learner_for(config, network_of(config, machine, module, head=head))
    counts = dict(saved.state)
    learner.restore(saved.parts, counts)
    options = StepOptions.of(config, plan)
    whole = replace(plan, world_size=1, share=plan.batch_size)
    network = learner.network
    with dataset.train_loader(config, whole, 0, network.dtype, network.device) as loader:
        replayer = Replayer(config, plan, dataset, learner, TrainState(**counts), loader, options)
        while replayer.state.step < step - 1:
            _, buffers = replayer.gradient(loader.batch(replayer.state.step))
            replayer.apply(buffers)
        batch = loader.batch(step - 1)
        found = _look_at(replayer, batch)
        pixels = loader.pixels(batch)
    samples = found.pop("samples")
    pictures = _write_pictures(out, f"step {step} of {run.resolve().name}", pixels, samples)
    return {
        "run": str(run),
        "step": step,
        "checkpoint": checkpoint.name_of(saved.step),
        "processes": world_size,
        "sync_bn": saved.about["config"].get("sync_bn", False),
        **found,
        "worst": samples[:SHOWN],
        "pictures": [str(path) for path in pictures],
    }


def _processes_at(run: Path, step: int) -> int | None:
    """On how many processes a step was made: what the last start before it said; None where no row is left."""
    events = [row for row in read_rows(run) if row["kind"] == "event" and row["step"] < step and "processes" in row]
    return int(events[-1]["processes"]) if events else None


def _newest_before(run: Path, step: int) -> checkpoint.Checkpoint:
    folder = run / checkpoint.FOLDER
    steps = checkpoint.listed(folder)
    if not steps:
        raise StorageError(f"{run}: no checkpoint is there; give a run directory")
    for saved in reversed([s for s in steps if s < step]):
        with contextlib.suppress(checkpoint.DamagedError):
            return checkpoint.load(folder / checkpoint.name_of(saved))
    raise UsageError(
        f"--step {step}: no sound checkpoint before it is left, the oldest is of step {steps[0]}; give a later step, "
        "or train again with a greater --keep"
    )


def _look_at(replayer: Replayer, batch: Batch) -> dict[str, Any]:
    """The step that `batch` is of: its losses, its gradient, what is not finite before and after."""
    learner, module = replayer.learner, replayer.learner.network.module
    before = _not_finite(learner.network.tensors())
    losses_N, buffers = replayer.gradient(batch)
    scale = learner.scaler.get_scale()
    gradients = {n: p.grad.detach() / scale for n, p in module.named_parameters() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    skipped = replayer.apply(buffers)
    losses = losses_N.tolist()
    finite = [loss for loss in losses if math.isfinite(loss)]
    # what is not finite first, then by size
    order = sorted(range(len(losses)), key=lambda i: (math.isfinite(losses[i]), -losses[i], i))
    labels = (batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)).tolist()  # mixed: the greater part
    names = replayer.dataset.train.class_names
    return {
        "loss": sum(finite) / max(1, len(finite)),
        "nonfinite_losses": len(losses) - len(finite),
        "gradient_norm": norm,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "skipped": skipped,
        "not_finite_before": before,
        "not_finite_gradients": _not_finite(gradients),
        "not_finite_after": _not_finite(learner.network.tensors()),
        "digest_after": checkpoint.digest(learner.network.tensors()),
        "samples": [
            {"place": i, "index": int(batch.indices[i]), "class": names[labels[i]], "loss": losses[i]} for i in order
        ],
    }


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [n for n, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]


# -- pictures ----------------------------------------------------------------------------------------------------------


def _write_pictures(out: Path, title: str, pictures: Pixels, rows: list[dict[str, Any]]) -> list[Path]:
    """worst.png and batch.png: what the network saw, by loss, with class, loss and place in the training set."""
    tiles = [
        Tile(pictures[row["place"]], [row["class"], f"loss {row['loss']:.4g}"], f"sample {row['index']}")
        for row in rows
    ]
    paths = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, most in (("worst", SHOWN), ("batch", PICTURES)):
            paths.append(out / f"{name}.png")
            of = f"{min(most, len(tiles))} of {len(tiles)} images, the greatest loss first"
            contact_sheet(title, of, tiles[:most]).save(paths[-1])
    except OSError as error:
        raise StorageError(f"cannot write pictures to {out}: {error.strerror}; give another --out") from error
    return paths


# -- for people --------------------------------------------------------------------------------------------------------


def print_replay(found: dict[str, Any]) -> None:
    """The same for people."""
    processes = found["processes"]
    shares = f"; the shares of {processes} processes one after the other, so rounding may differ" * (processes > 1)
    if processes > 1 and found["sync_bn"]:
        shares += ", and batch norm saw each share alone"
    print(f"step {found['step']} of {found['run']}, computed from {found['checkpoint']}{shares}")
    print(f"  loss           {found['loss']:.6g}{_beside(found['nonfinite_losses'])}")
    print(f"  gradient norm  {found['gradient_norm']:.6g}, before clipping")
    print(f"  lr             {found['lr']:.6g}")
    print(f"  update         {'skipped' if found['skipped'] else 'applied'}")
    for when in ("before", "gradients", "after"):
        names = found[f"not_finite_{when}"]
        what = "gradients" if when == "gradients" else f"tensors {when} it"
        listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        print(f"  not finite     {what}: {listed or 'none'}")
    if found["not_finite_before"]:
        print(f"  the network was not finite before this step: look at --step {found['step'] - 1}")
    print("worst samples, by their place in the training set")
    for row in found["worst"]:
        print(f"  {row['index']:>8}  {row['class']}  loss {row['loss']:.6g}")
    print(f"pictures of them, and of the batch, in {Path(found['pictures'][0]).parent}")


def _beside(nonfinite: int) -> str:
    return f" over those that are finite; {nonfinite} are not" if nonfinite else ""
