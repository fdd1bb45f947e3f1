"""`dtrain replay RUN --step K`: computes one step of a run again, to find out what happened in it.

K counts steps from 1, as metrics.jsonl and the console do. A single process resumes from the newest checkpoint before K
and computes the steps up to K, with the same samples, augmentation and dropout as the run. It computes the shares of
the run's processes one after the other. Nothing is written into the run directory.
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

from dtrain import assembly
from dtrain.commands.contact_sheet import Tile, contact_sheet
from dtrain.data.batch import Batch
from dtrain.data.dataset import DataSet
from dtrain.data.loader import Loader
from dtrain.errors import StorageError, UsageError
from dtrain.model.learner import Learner
from dtrain.model.nonfinite import Before
from dtrain.model.optimization import set_lr
from dtrain.model.step import StepOptions, backward, seed_step, update
from dtrain.plan import Plan
from dtrain.run import checkpoint
from dtrain.run.console import Console
from dtrain.run.rows import EventRow
from dtrain.run.rundir import read_record, read_rows
from dtrain.run.state import TrainState, read_state
from dtrain.settings.config import TrainConfig
from dtrain.world import World

Pixels = npt.NDArray[np.uint8]
SHOWN, PICTURES = 10, 256  # the most samples in a list, and the most in batch.png


@dataclass(frozen=True)
class Replayer:
    """A run at the step of `state`, and all that is needed to compute its next steps in this process alone.

    plan: the run's, with its number of processes. loader: gives whole global batches, not one process's share.
    """

    config: TrainConfig
    plan: Plan
    dataset: DataSet
    learner: Learner
    state: TrainState
    loader: Loader
    options: StepOptions

    def gradient(self, batch: Batch) -> tuple[Tensor, Before]:
        """Compute the gradient of this step. Returns the loss of each image in the batch and a copy of the old buffers.

        The shares are computed one after the other, each with the random numbers of its process and from the same
        buffers. Rank 0's share is computed last, because a run keeps the buffers of rank 0.
        """
        learner, network, now = self.learner, self.learner.network, self.plan.at(self.state.step)
        learner.optimizer.zero_grad(set_to_none=True)
        learner.frozen.hold(now.epoch)
        set_lr(learner.optimizer, now.lr_factor)
        before, losses = Before(network.module.buffers()), []
        always = torch.ones((), dtype=torch.bool, device=network.device)
        for rank in reversed(range(len(now.shares))):
            before.put_back(always)
            seed_step(self.config.run.seed, self.state.step, rank, network.device)
            share = replace(now.shares[rank], mean_over=now.batch_size)  # gradients are summed here, not averaged
            at = share.positions
            part = Batch(batch.images[at], batch.labels[at], batch.indices[at], batch.checksum)
            losses.append(backward(network, learner.scaler, part, self.options, share)[1])
        return torch.cat(losses[::-1]), before

    def apply(self, buffers: Before) -> bool:
        """Update the network from the gradient that `gradient` computed; returns whether the update was skipped.

        buffers: the copy that `gradient` returned, which is put back if the update is skipped.
        """
        learner = self.learner
        now = self.plan.at(self.state.step)
        skipped = update(learner, self.options, buffers, now.epoch)
        self.state.advance(now.batch_size)
        return bool(skipped)


def replay(run: Path, step: int, out: Path | None, here: Mapping[str, Any]) -> dict[str, Any]:
    """Compute step `step` of `run` again and write pictures of its images to the folder `out`.

    step: counted from 1. out: by default replay-RUN-STEP in the current folder. here: settings that replace the run's
    own, such as device and folders.
    Returns what `print_replay` prints. Raises UsageError for a step that the run does not have or that no checkpoint
    precedes, DataError if the data set has changed since the run. Computes every step since that checkpoint.
    """
    out = out or Path(f"replay-{run.resolve().name}-{step:08d}")
    if out.resolve().is_relative_to(run.resolve()):
        raise UsageError(f"--out {out}: lies in the run, into which nothing is written; give another folder")
    saved = _newest_before(run, step)
    record = read_record(run)
    resolved = dict(record.resolved) if record is not None else {}
    world_size = _processes_at(run, step) or int(resolved.get("world_size", 1))
    config, machine, dataset = assembly.seen_again(saved.about, here, resolved)
    plan = assembly.plan_of(config, **dataset.sizes, world_size=world_size)
    if not 0 < step <= plan.total_steps:
        raise UsageError(f"--step {step}: this run has the steps 1 to {plan.total_steps}")
    module, head = assembly.built_network(config, dataset, plan, World.alone(), Console(False))
    learner = assembly.learner_for(config, assembly.wrapped_network(config, machine, module, head=head))
    state, counts = read_state(saved.state)
    learner.restore(saved.parts, counts)
    whole, feed = assembly.plan_of(config, **dataset.sizes, world_size=1), assembly.feed_of(config, machine)
    with dataset.train_loader(whole, 0, config.augmentation, feed) as loader:
        options = assembly.options_of(config)
        replayer = Replayer(config, plan, dataset, learner, state, loader, options)
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
    """The number of processes that computed a step, from the last start or resume before it; None if not recorded."""
    told = [row.processes for row in read_rows(run) if isinstance(row, EventRow) and row.step < step and row.processes]
    return told[-1] if told else None


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
    """Compute the step of `batch`, and return its losses, its gradient norm and the tensors that are not finite."""
    learner, module = replayer.learner, replayer.learner.network.module
    before = _not_finite(learner.network.tensors())
    rate = assembly.choice_of(replayer.config).lr * replayer.plan.at(replayer.state.step).lr_factor  # as rows have it
    losses_N, buffers = replayer.gradient(batch)
    scale = learner.scaler.get_scale()
    gradients = {n: p.grad.detach() / scale for n, p in module.named_parameters() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    skipped = replayer.apply(buffers)
    losses = losses_N.tolist()
    finite = [loss for loss in losses if math.isfinite(loss)]
    # losses that are not finite come first, then the largest
    order = sorted(range(len(losses)), key=lambda i: (math.isfinite(losses[i]), -losses[i], i))
    # a mixed image goes by the class with the larger weight
    labels = (batch.labels if batch.labels.ndim == 1 else batch.labels.argmax(1)).tolist()
    names = replayer.dataset.train.class_names
    return {
        "loss": sum(finite) / max(1, len(finite)),
        "nonfinite_losses": len(losses) - len(finite),
        "gradient_norm": norm,
        "lr": rate,
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
    """Draw worst.png and batch.png: the images, the largest loss first, with class, loss and index in the data set."""
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
    """Print what `replay` returned, for people."""
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
    print("the samples with the largest losses, by their index in the training set")
    for row in found["worst"]:
        print(f"  {row['index']:>8}  {row['class']}  loss {row['loss']:.6g}")
    print(f"pictures of these samples and of the batch are in {Path(found['pictures'][0]).parent}")


def _beside(nonfinite: int) -> str:
    return f" over those that are finite; {nonfinite} are not" if nonfinite else ""
