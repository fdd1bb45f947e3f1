"""Builds the parts of a run from its config: machine, data set, plan, network and learner.

Training, evaluation, replay, dry runs and `load_network` all call these functions, so that they build the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import runtime
from dtrain.data.cache import CONVERSION_SECONDS
from dtrain.data.dataset import Chunks, DataSet, Feed, load_dataset
from dtrain.data.loader import Loader
from dtrain.errors import StorageError, UsageError
from dtrain.model import groups, rehearsal
from dtrain.model.learner import Learner, learner_of
from dtrain.model.network import Network, build_module, chosen_architecture, layout, mode_told, wrap
from dtrain.model.optimization import Choice, build_optimizer, chosen_optimizer
from dtrain.model.step import StepOptions
from dtrain.plan import Plan, check_batch, make_plan
from dtrain.run import checkpoint, trackers
from dtrain.run.console import Console, three_ways
from dtrain.run.recorder import Recorder, open_recorder, recorder_elsewhere, refuse_other_data
from dtrain.runtime import Runtime
from dtrain.schedules import chosen_schedule
from dtrain.settings import identity
from dtrain.settings.config import SETTINGS, TrainConfig
from dtrain.settings.layers import RUN_CONFIG, read_config
from dtrain.settings.staged import Staged
from dtrain.settings.values import flag_of, plain
from dtrain.world import Place, World


@dataclass(frozen=True)
class Parts:
    """The parts of a run in one process. Close this after use, because its loaders have threads."""

    config: TrainConfig
    machine: Runtime
    dataset: DataSet
    plan: Plan
    learner: Learner
    options: StepOptions
    loader: Loader
    chunks: Chunks

    def close(self) -> None:
        """End the threads of both loaders."""
        self.loader.close()
        self.chunks.loader.close()


def parts_of(
    config: TrainConfig, machine: Runtime, dataset: DataSet, plan: Plan, world: World, console: Console
) -> Parts:
    """All parts of process `world.rank`. The network has its initial weights and has passed trial steps. Collective."""
    for line in (*machine.why, *dataset.left_out, *plan.lines(rate_told(config))):
        console.line(line)
    end = plan.epochs_done(plan.total_steps)
    for pattern in config.optimization.freeze or ():
        if (epoch := pattern.rpartition("@")[2]).isdecimal() and "@" in pattern and int(epoch) >= end:
            console.line(f"not reached: --freeze {pattern} ends with epoch {epoch}, and the run has {end:.4g}")
    learner = learner_for(config, rehearsed_network(config, machine, dataset, plan, world, console))
    feed = feed_of(config, machine)
    loader = dataset.train_loader(plan, world.rank, config.augmentation, feed)
    chunks = chunks_of(config, dataset, plan, world, feed)
    parameters = sum(p.numel() for p in learner.network.module.parameters())
    console.line(f"{config.network.arch}, {parameters:,} parameters; {config.optimization.opt}; {loader.told} reader")
    return Parts(config, machine, dataset, plan, learner, options_of(config), loader, chunks)


# -- before the data set is there --------------------------------------------------------------------------------------


def check(config: TrainConfig, world_size: int) -> None:
    """Raise every error that can be detected before a data set is downloaded or converted."""
    identity.check_resume(config)
    check_batch(config.optimization, mixing=mixing(config), world_size=world_size)
    chosen_architecture(config.network.arch, config.network.arch_opt)
    choice_of(config)
    chosen_schedule(config.optimization.schedule, config.optimization.schedule_opt, total=1.0)
    trackers.find(config.run.track)


def choice_of(config: TrainConfig) -> Choice:
    """The optimizer that `config` names, with its options and rate."""
    return chosen_optimizer(config.optimization, config.by_hand)


def rate_told(config: TrainConfig) -> str:
    """The peak learning rate and where it comes from, as text for the user."""
    rate, origin = choice_of(config).lr, config.origin("lr")
    why = {"default": f"the default of {config.optimization.opt}", "flag": "as asked", "run": "as this run began"}
    return f"{rate:g} ({why.get(origin, f'from {origin}')})"


def mixing(config: TrainConfig) -> tuple[str, ...]:
    """The flags of `config` that mix images in pairs."""
    return tuple(flag_of(name) for name in ("mixup", "cutmix") if config.value(name) > 0)


def machine_of(config: TrainConfig, at: Place, kept: Mapping[str, Any] | None = None) -> Runtime:
    """The runtime of this process, from `runtime.decide`. It is not applied."""
    return runtime.decide(config.machine, local_rank=at.local_rank, local_world=at.local_size, kept=kept)


# -- data set, plan, loaders -------------------------------------------------------------------------------------------


def dataset_of(config: TrainConfig, console: Console, found: Path | None = None) -> DataSet:
    """The data set of `config`, converted first if needed. found: see `prepare`, whose errors are raised here."""
    seed, arch = config.run.seed, config.network.arch
    return console.converting(load_dataset(config.data, arch=arch, seed=seed, found=found))


def dataset_of_all(config: TrainConfig, world: World, console: Console) -> DataSet:
    """`dataset_of` for all processes: the first process of each host finds, converts and verifies it. Collective.

    Raises ProcessError on every process unless all have the same data set.
    """
    data = config.data
    asked = repr((data.dataset, data.dataset_opt, data.data_dir, data.cache_dir, data.conversion()))

    def load(told: str) -> DataSet:
        of, _, folder = told.rpartition("\n")  # a process with other settings searches itself
        return dataset_of(config, console, Path(folder) if of == asked else None)

    dataset = world.first_of_host(load, lambda found: f"{asked}\n{found.folder}", "prepared", CONVERSION_SECONDS)
    world.same(str(dataset.facts), f"data set {data.dataset}")
    return dataset


def plan_of(config: TrainConfig, *, train_size: int, image_size: int, world_size: int) -> Plan:
    """The plan of a run of `config` on `train_size` images with `world_size` processes.

    image_size: the side in pixels of the data set's images, used if `config` sets no other size. Raises the errors of
    `make_plan`.
    """
    return make_plan(
        config.optimization,
        seed=config.run.seed,
        train_size=train_size,
        image_size=config.data.image_size or Staged.parse(image_size),
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
    """The form in which batches reach the network of `config` on `machine`."""
    return Feed(
        dtype=machine.dtype(),
        device=machine.torch_device(),
        reader=config.data.loader,
        mean=config.data.mean,
        std=config.data.std,
        channels_last=config.machine.channels_last,
        threads=machine.threads,
    )


def chunks_of(config: TrainConfig, dataset: DataSet, plan: Plan, at: Place | World, feed: Feed) -> Chunks:
    """The part of an evaluation that process `at` computes, at the image size of the last stage. Close its loader."""
    size = config.evaluation.eval_batch_size
    return dataset.chunks(at.rank, at.size, feed, chunk_size=size, image_size=plan.evaluation_size)


# -- network and learner -----------------------------------------------------------------------------------------------


def module_of(config: TrainConfig, facts: Mapping[str, Any], image_size: int | None = None) -> nn.Module:
    """The module of `config` with the weights of its seed, on the CPU. facts: the data set's, as in a checkpoint.

    image_size: the image side in pixels that the module is built for, if it differs from that of the data set.
    """
    return build_module(
        config.network.arch,
        config.network.arch_opt,
        seed=config.run.seed,
        num_classes=len(facts["class_names"]),
        in_channels=facts["channels"],
        image_size=image_size or facts["image_size"],
    )


def noise_of(config: TrainConfig, channels: int, count: int, side: int) -> Tensor:
    """Random images that depend on the seed, float32 [count, channels, side, side], in the network's memory layout."""
    shape, memory_format = (count, channels, side, side), layout(config.machine.channels_last)
    return rehearsal.noise(config.run.seed, shape, torch.float32, memory_format)


def built_network(
    config: TrainConfig, dataset: DataSet, plan: Plan, world: World, console: Console
) -> tuple[nn.Module, tuple[str, ...]]:
    """The module, tested on images of every stage and with its frozen parts frozen, and the parameters of its head.

    Raises PluginError for a faulty module, and UsageError for an invalid `--freeze`. Collective.
    """
    arch, facts, channels = config.network.arch, dataset.facts, dataset.channels
    with rehearsal.smallest_size_told(lambda side: module_of(config, facts, side), channels, plan.image_sizes[0]):
        module = module_of(config, facts)
        if (warning := mode_told(module, arch)) is not None:
            console.warn(warning)
        # compare before DDP, which would hide a difference by broadcasting the weights of rank 0
        world.same(rehearsal.digest_of(module.state_dict()), f"the initial network of architecture {arch}")
        for side in plan.image_sizes:
            images = noise_of(config, channels, 2, side)
            head = rehearsal.first_output(module, images, arch, len(facts["class_names"]))
    groups.freeze(module, groups.frozen_until(config.optimization.freeze or (), module))
    return module, head


def wrapped_network(
    config: TrainConfig,
    machine: Runtime,
    module: nn.Module,
    *,
    head: tuple[str, ...] = (),
    world_size: int = 1,
    moving_buffers: bool = False,
) -> Network:
    """A module as `config` and `machine` ask for it (`wrap`). Collective for more than one process."""
    return wrap(
        module,
        device=machine.torch_device(),
        dtype=machine.dtype(),
        channels_last=config.machine.channels_last,
        sync_bn=config.network.sync_bn,
        compiled=config.machine.compile,
        world_size=world_size,
        moving_buffers=moving_buffers,
        head=head,
    )


def rehearsed_network(
    config: TrainConfig, machine: Runtime, dataset: DataSet, plan: Plan, world: World, console: Console
) -> Network:
    """The network, after trial steps at the sizes of every stage, which find errors before training. Collective."""
    module, head = built_network(config, dataset, plan, world, console)
    channels, last = dataset.channels, plan.image_sizes[-1]
    moving = world.size > 1 and rehearsal.buffers_move_output(
        module, noise_of(config, channels, 2, last), config.run.seed
    )
    if moving:
        console.line("the training output depends on buffers: rank 0's are sent to the others at every step")
    network = wrapped_network(config, machine, module, head=head, world_size=world.size, moving_buffers=moving)
    # The passes are collective, so every process runs the same shapes, including those that only others will train on.
    # A compiled network is compiled again for each shape, so it needs the real batch sizes. Otherwise two images find
    # the same errors as a larger batch; a batch of one image is tested as such, because it can fail on its own
    shapes = plan.shapes if config.machine.compile else {(min(count, 2), side) for count, side in plan.shapes}
    for count, side in sorted(shapes):
        images = noise_of(config, channels, count, side).to(network.device, machine.dtype())
        rehearsal.rehearse(network, images, config.network.arch, len(dataset.train.class_names), world)
    return network


def groups_for(config: TrainConfig, module: nn.Module, head: tuple[str, ...]) -> list[groups.Group]:
    """The parameter groups that `config` asks for. head: names of the parameters of the layer that gives the logits."""
    asked = config.optimization
    return groups.grouped(
        module,
        lr=choice_of(config).lr,
        head=head,
        until=groups.frozen_until(asked.freeze or (), module),
        layer_decay=asked.layer_decay,
        head_lr=asked.head_lr,
    )


def learner_for(config: TrainConfig, network: Network) -> Learner:
    """The network with the optimizer, scaler and EMA that `config` asks for. Raises the errors of `build_optimizer`."""
    module, asked = network.module, config.optimization
    optimizer = build_optimizer(choice_of(config), groups_for(config, module, network.head), module)
    return learner_of(network, optimizer, ema=asked.ema, until=groups.frozen_until(asked.freeze or (), module))


def options_of(config: TrainConfig) -> StepOptions:
    """How a step of `config` is computed."""
    asked = config.optimization
    return StepOptions(asked.smoothing, asked.clip_grad, skip_nonfinite=asked.on_nonfinite == "skip")


# -- a run that is there -----------------------------------------------------------------------------------------------


def recorder_of(config: TrainConfig, *, main: bool, command: Sequence[str], resolved: Mapping[str, Any]) -> Recorder:
    """The recorder of a run: on the main process it owns the run directory, elsewhere it does nothing.

    command: the command line. resolved: the values that `auto` resolved to. Raises the errors of `open_recorder`.
    """
    path = identity.run_path(config)
    if not main:
        return recorder_elsewhere(path)
    return open_recorder(
        path,
        config.settings(),
        resume=config.run.resume,
        refuse=lambda taken: refuse_other_settings(taken, config),
        command=command,
        resolved=resolved,
        chosen=(
            ("architecture", config.network.arch),
            ("optimizer", config.optimization.opt),
            ("schedule", config.optimization.schedule),
        ),
        track=config.run.track,
    )


def refuse_other_settings(path: Path, config: TrainConfig) -> None:
    """Raise UsageError, with a table, if the run at `path` differs from `config` in a setting that affects results."""
    try:
        before = TrainConfig.stored(read_config(path / RUN_CONFIG))
    except UsageError as error:
        raise UsageError(f"{path / RUN_CONFIG}: {error}; use the version of dtrain that wrote it") from None
    if not (refused := identity.differing(before, config)):
        return
    was, asked = ({name: _told(c.value(name)) for name in SETTINGS} for c in (before, config))
    told = "; ".join(f"{name}: was {was[name]}, asked {asked[name]}" for name in refused[:3])
    told += f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
    others = [name for name in SETTINGS if was[name] != asked[name] and name not in (*refused, *identity.WHERE)]
    rows = [*((name, "refused") for name in refused), *((name, asked[name]) for name in others)]
    table = three_ways((name, was[name], asked[name], used) for name, used in rows)
    raise UsageError(f"{path} holds a run with other settings ({told}); give another --output", table=table)


def _told(value: Any) -> Any:
    return None if value is None else plain(value)


def seen_again(
    saved_about: Mapping[str, Any], here: Mapping[str, Any], kept: Mapping[str, Any]
) -> tuple[TrainConfig, Runtime, DataSet]:
    """The config, machine and data set of a checkpoint, for use in this process alone. The machine is applied.

    saved_about: the checkpoint's `about`. here: settings that replace the run's own, such as device and folders. kept:
    the values that `auto` resolved to when the run began. Raises DataError if the data set has changed since.
    """
    config = TrainConfig.elsewhere(saved_about["config"], here)
    machine = machine_of(config, Place(), kept)
    runtime.apply(machine)
    dataset = dataset_of(config, Console(False))
    refuse_other_data(config.data.dataset, was=saved_about, asked=dataset.facts)
    return config, machine, dataset


def agreed_machine(config: TrainConfig, at: Place, world: World, kept: Mapping[str, Any]) -> Runtime:
    """The runtime of this process, with the precision of process 0. It is applied. Collective."""
    machine = machine_of(config, at, kept)
    machine = replace(machine, amp_dtype=world.from_main(lambda: machine.amp_dtype))
    runtime.apply(machine)
    return machine


def load_network(run: Path | str, step: int | None = None) -> nn.Module:
    """The network of a run's checkpoint (its last, or the one of `step`), in evaluation mode, on the CPU.

    Raises StorageError if there is no undamaged checkpoint.
    """
    checkpoints = Path(run) / checkpoint.FOLDER
    if step is None:
        saved = checkpoint.find(checkpoints).checkpoint
    else:
        saved = checkpoint.load(checkpoints / checkpoint.name_of(step))
    if saved is None:
        raise StorageError(f"{run}: no sound checkpoint is there")
    module = module_of(TrainConfig.stored(saved.about["config"]), saved.about)
    module.load_state_dict(saved.parts["network"])
    return module.eval()
