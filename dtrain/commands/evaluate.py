"""`dtrain eval RUN`: exact counts of a checkpoint on the run's own evaluation split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtrain import runtime
from dtrain.config import TrainConfig
from dtrain.data.beton import prepare
from dtrain.data.loader import open_loader
from dtrain.errors import StorageError, UsageError
from dtrain.keyed import stratified
from dtrain.model.evaluation import chunks_of
from dtrain.model.network import build_module, wrap
from dtrain.model.step import loss_of
from dtrain.run import checkpoint
from dtrain.run.console import Console, counted
from dtrain.world import Place, World


def find_checkpoint(run: Path, which: str) -> Path:
    """The folder of the checkpoint that `which` means: last, best or a step. Raises StorageError, UsageError."""
    folder = run / "checkpoints"
    newest = checkpoint.find(folder).path
    if newest is None:
        raise StorageError(f"{run}: no sound checkpoint is there; give a run directory")
    if which == "last":
        return newest
    if which == "best":
        best = checkpoint.load(newest).state["best"]
        if best is None:
            raise UsageError(f"{run}: no evaluation has been made yet; use --checkpoint last")
        return folder / checkpoint.name_of(best["step"])
    if not which.isdigit() or int(which) not in checkpoint.listed(folder):
        steps = ", ".join(map(str, checkpoint.listed(folder)))
        raise UsageError(f"--checkpoint {which}: give last, best or one of {steps}")
    return folder / checkpoint.name_of(int(which))


def evaluate_run(run: Path, which: str, *, loader: str) -> dict[str, Any]:
    """Evaluate raw and EMA weights of a checkpoint in one process, in the run's chunks and precision.

    Returns per kind of weights: hits, hits5, images, loss, and per class hits and images.
    """
    saved = checkpoint.load(find_checkpoint(run, which))
    config, classes = TrainConfig.stored(saved.about["config"]), saved.about["class_names"]
    machine = runtime.decide(config, local_rank=0, local_world=1)
    runtime.apply(machine, deterministic=config.deterministic)
    betons = Console(False).converting(
        prepare(config.dataset, config.data_dir, config.cache_dir, timeout_seconds=config.dist_timeout)
    )
    split, samples = "test", np.arange(len(betons["test"].labels))
    if config.val_split is not None:
        split, samples = "train", np.flatnonzero(stratified(betons["train"].labels, config.val_split, config.seed))
    beton, train, alone = betons[split], betons["train"], World(Place(), config.dist_timeout)
    rounds, request_at = chunks_of(samples, config.eval_batch_size, alone)
    results: dict[str, Any] = {}
    for weights in [name for name in ("network", "ema") if name in saved.parts]:
        module = build_module(config, num_classes=len(classes), in_channels=beton.channels, image_size=beton.image_size)
        module.load_state_dict(saved.parts[weights])
        network = wrap(module, config, machine, alone, moving_buffers=False)
        module.eval()
        hits, images, hits5, loss = np.zeros(len(classes), int), np.zeros(len(classes), int), 0, 0.0
        with (
            torch.no_grad(),
            open_loader(
                beton,
                request_at,
                kind=loader,
                augmentation=None,
                mean=config.mean or train.mean,
                std=config.std or train.std,
                dtype=network.dtype,
                device=network.device,
                largest=config.eval_batch_size,
            ) as batches,
        ):
            for turn in range(rounds):
                batch = batches.batch(turn)
                with network.autocast():
                    output = module(batch.images)
                losses_N, logits_NK = loss_of(output, batch.labels, 0.0)
                labels = batch.labels.cpu().numpy()
                right = (logits_NK.argmax(1) == batch.labels).cpu().numpy()
                hits += np.bincount(labels[right], minlength=len(classes))
                images += np.bincount(labels, minlength=len(classes))
                hits5 += int((logits_NK.topk(min(5, len(classes)), 1).indices == batch.labels[:, None]).sum())
                loss += float(losses_N.double().sum())
        per_class = {n: {"hits": int(h), "images": int(i)} for n, h, i in zip(classes, hits, images, strict=True)}
        total = int(images.sum())
        results["raw" if weights == "network" else "ema"] = {
            "hits": int(hits.sum()),
            "hits5": hits5,
            "images": total,
            "loss": loss / total,
            "per_class": per_class,
        }
    return {"run": str(run), "step": saved.step, "split": "val" if config.val_split else "test", "weights": results}


def print_evaluation(result: dict[str, Any]) -> None:
    """The same for people."""
    for weights, figures in result["weights"].items():
        print(f"{result['split']} at step {result['step']}, {weights} weights")
        print(f"  top-1  {counted(figures['hits'], figures['images'])}")
        print(f"  top-5  {counted(figures['hits5'], figures['images'])}")
        print(f"  loss   {figures['loss']:.4f}")
        for name, row in figures["per_class"].items():
            print(f"  {name:<16} {counted(row['hits'], row['images'])}")
