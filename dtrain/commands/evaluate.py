"""`dtrain eval RUN`: evaluates a checkpoint on the evaluation split of its run; counts correct answers exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain import assembly
from dtrain.data.dataset import DataSet
from dtrain.errors import StorageError, UsageError
from dtrain.model.metrics import Sums, no_sums
from dtrain.model.step import eval_step
from dtrain.run import checkpoint
from dtrain.run.console import counted
from dtrain.run.rows import EvalRow
from dtrain.run.rundir import read_record, read_rows
from dtrain.runtime import Runtime
from dtrain.settings.config import TrainConfig
from dtrain.world import Place


def load_checkpoint(run: Path, which: str) -> checkpoint.Checkpoint:
    """Load the checkpoint that `which` means: "last", "best" or a step.

    Raises StorageError if the run has no sound checkpoint or the chosen one is damaged, UsageError if it has no
    checkpoint of that step.
    """
    folder = run / checkpoint.FOLDER
    if which == "last" or not checkpoint.listed(folder):
        if (newest := checkpoint.find(folder).checkpoint) is None:
            raise StorageError(f"{run}: no sound checkpoint is there; give a run directory")
        return newest
    step = _best_step(run) if which == "best" else int(which) if which.isdigit() else None
    if step not in checkpoint.listed(folder):
        steps = ", ".join(map(str, checkpoint.listed(folder)))
        raise UsageError(f"--checkpoint {which}: give last, best (if it was saved) or one of {steps}")
    return checkpoint.load(folder / checkpoint.name_of(step))


def _best_step(run: Path) -> int | None:
    evaluations = [row for row in read_rows(run) if isinstance(row, EvalRow)]
    return max(evaluations, key=lambda row: row.hits).step if evaluations else None


def evaluate_run(run: Path, which: str, here: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the raw and, if there are any, the EMA weights of a checkpoint in one process.

    Images are evaluated in the same batches and the same precision as in the run. here: settings that replace the run's
    own, such as device and folders.
    Returns for each kind of weights: hits (correct top-1 answers), hits5 (correct in the top 5), images, mean loss, and
    for each class hits and images.
    """
    saved, record = load_checkpoint(run, which), read_record(run)
    kept = {"amp_dtype": record.resolved.get("amp_dtype")} if record is not None else {}
    config, machine, dataset = assembly.seen_again(saved.about, here, kept)
    results = {
        weights: _counts(config, machine, dataset, saved.parts[part])
        for weights, part in (("raw", "network"), ("ema", "ema"))
        if part in saved.parts
    }
    return {"run": str(run), "step": saved.step, "split": dataset.evaluation_split, "weights": results}


def _counts(config: TrainConfig, machine: Runtime, dataset: DataSet, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    beton, plan = dataset.evaluation, assembly.plan_of(config, **dataset.sizes, world_size=1)
    classes = len(beton.class_names)
    module = assembly.module_of(config, dataset.facts)
    module.load_state_dict(dict(tensors))
    network = assembly.wrapped_network(config, machine, module)
    module.eval()
    chunks = assembly.chunks_of(config, dataset, plan, Place(), assembly.feed_of(config, machine))
    sums, hits = no_sums(network.device), torch.zeros(classes, dtype=torch.int64, device=network.device)
    with chunks.loader:
        for turn in range(chunks.rounds):
            batch = chunks.loader.batch(turn)
            batch_sums, right_N = eval_step(network, module, batch)
            sums += batch_sums
            hits += torch.bincount(batch.labels[right_N], minlength=classes)
    total = Sums.of(sums.tolist())
    images = np.bincount(beton.labels[dataset.evaluation_samples], minlength=classes)
    return {
        "hits": total.hits,
        "hits5": total.hits5,
        "images": total.images,
        "loss": total.loss,
        "per_class": {
            name: {"hits": int(h), "images": int(i)}
            for name, h, i in zip(beton.class_names, hits.tolist(), images, strict=True)
        },
    }


def print_evaluation(result: dict[str, Any]) -> None:
    """Print what `evaluate_run` returned, for people."""
    for weights, figures in result["weights"].items():
        print(f"{result['split']} at step {result['step']}, {weights} weights")
        print(f"  top-1  {counted(figures['hits'], figures['images'])}")
        print(f"  top-5  {counted(figures['hits5'], figures['images'])}")
        print(f"  loss   {figures['loss']:.4f}")
        for name, row in figures["per_class"].items():
            print(f"  {name:<16} {counted(row['hits'], row['images'])}")
