"""From a config to what a run is made of: machine, data set, plan, network, learner. The one place that joins the rooms.

Training, evaluation, replay, dry runs and `load_network` all call these functions, so that what they see is the same.
"""

from __future__ import annotations

from pathlib import Path

from dtrain.data.cache import CONVERSION_SECONDS
from dtrain.data.dataset import DataSet, Feed, load_dataset
from dtrain.data.loader import Loader
from dtrain.plan import Plan, make_plan
from dtrain.run.console import Console
from dtrain.runtime import Runtime
from dtrain.settings import TrainConfig, flag_of
from dtrain.settings.staged import Staged
from dtrain.world import World


def dataset_of(config: TrainConfig, console: Console, found: Path | None = None) -> DataSet:
    """The data set of `config`, converted first where that is due. found: see `prepare`, whose errors are raised."""
    seed, arch = config.run.seed, config.network.arch
    return console.converting(load_dataset(config.data, arch=arch, seed=seed, found=found))


def dataset_of_all(config: TrainConfig, world: World, console: Console) -> DataSet:
    """The same for all processes of a run: the first of each host finds, converts and verifies it. Collective.

    Raises ProcessError on every process unless all have the same data set.
    """
    asked = repr((config.data.dataset, config.data.dataset_opt, config.data.data_dir, config.data.cache_dir))
    asked += repr(config.data.conversion())

    def load(told: str) -> DataSet:
        of, _, folder = told.rpartition("\n")  # a process that was given other settings looks for itself
        return dataset_of(config, console, Path(folder) if of == asked else None)

    dataset = world.first_of_host(load, lambda found: f"{asked}\n{found.folder}", "prepared", CONVERSION_SECONDS)
    world.same(str(dataset.facts), f"data set {config.data.dataset}")
    return dataset


def mixing(config: TrainConfig) -> tuple[str, ...]:
    """The flags of `config` that mix images in pairs."""
    return tuple(flag_of(name) for name in ("mixup", "cutmix") if config.value(name) > 0)


def plan_of(config: TrainConfig, dataset: DataSet, world_size: int) -> Plan:
    """The plan of a run of `config` with `world_size` processes. Raises what `make_plan` raises."""
    return make_plan(
        config.optimization,
        seed=config.run.seed,
        train_size=len(dataset.train_samples),
        image_size=config.data.image_size or Staged.parse(dataset.image_size),
        world_size=world_size,
        mixing=mixing(config),
        # a recipe's warm-up is meant for the recipe's length, so it is shortened where a run is too short for it; that
        # holds for a run's own config.toml as well, which no longer knows what came from a recipe
        warmup_yields="warmup_epochs" not in config.by_hand,
        log_interval=config.run.log_interval,
        eval_every=config.evaluation.eval_every,
        save_every=config.run.checkpoint_every,
    )


def feed_of(config: TrainConfig, machine: Runtime) -> Feed:
    """In which form batches reach the network of `config` on `machine`."""
    return Feed(
        dtype=machine.dtype(),
        device=machine.torch_device(),
        reader=config.data.loader,
        mean=config.data.mean,
        std=config.data.std,
        channels_last=config.machine.channels_last,
        threads=machine.threads,
    )


def train_loader_of(config: TrainConfig, dataset: DataSet, plan: Plan, rank: int, feed: Feed) -> Loader:
    """The augmented batches of process `rank`, by step. Close it after use."""
    return dataset.train_loader(plan, rank, config.augmentation, feed)
