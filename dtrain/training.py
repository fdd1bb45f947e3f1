"""train(config) -> Summary: set up, then the loop. The only file that sees every room.

train      who we are, the data set, the plan, the run directory; what happens to an error
Training   one run, ready to go: `loop` on one screen, below it the verbs that the loop is made of
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import runtime
from dtrain.config import TrainConfig, settings_fields
from dtrain.data.cache import CONVERSION_SECONDS
from dtrain.data.dataset import DataSet, load_dataset
from dtrain.errors import DivergedError, Stopped, StorageError
from dtrain.model import rehearsal
from dtrain.model.evaluation import evaluate
from dtrain.model.groups import Group, freeze, frozen_until, grouped
from dtrain.model.learner import Learner, learner_of
from dtrain.model.metrics import Sums, Tally
from dtrain.model.network import Network, build_module, chosen_architecture, layout, mode_told, wrap
from dtrain.model.nonfinite import GIVE_UP_STEPS, told
from dtrain.model.optimization import Choice, build_optimizer, chosen_optimizer, set_lr
from dtrain.model.step import StepOptions, seed_step, train_step
from dtrain.plan import Plan, check_batch, make_plan
from dtrain.run import checkpoint, trackers
from dtrain.run.console import Console, counted, shown, span
from dtrain.run.recorder import Recorder, open_recorder, refuse_other_data, resolved_before
from dtrain.run.state import RunClock, Stopwatch, TrainState
from dtrain.world import Ask, Place, World, place, signals_as_before


@dataclass(frozen=True)
class Summary:
    """What a run came to. evaluations: the last eval row of each kind of weights ("raw", "ema")."""

    run: Path
    status: str
    step: int
    evaluations: dict[str, dict[str, Any]]
    best: dict[str, Any] | None
    seconds: dict[str, float]


def train(config: TrainConfig, *, command: Sequence[str] = (), stop_after: int | None = None) -> Summary:
    """Run `config` to its end, going on where its run directory stands.

    Under torchrun every process calls it. stop_after: stop, save and raise Stopped once this many updates are done, as
    a signal then would. command: the command line, for the record; its process ends with the run, so after a stop
    signals stay ignored (a late one must not change the exit code), else they are as before.
    Raises DtrainError for all that dtrain can explain; Stopped after a save that was asked for.
    """
    started, at = time.monotonic(), place()
    world, console = World(at, config.dist_timeout), Console(at.is_main)
    with ExitStack() as opened:  # what has to be closed, last opened first: readers, the run directory, the bar
        if not command:
            opened.enter_context(signals_as_before())
        opened.callback(console.stop)
        recorder = None
        try:
            machine = _join(config, world, at)
            with runtime.memory_told("while the data set was prepared; it needs a larger machine"):
                dataset = console.converting(load_dataset(config))
            world.wait_for_all("prepared", CONVERSION_SECONDS)  # each host may convert for itself, one for longer
            world.same(str(dataset.facts), f"data set {config.dataset}")
            plan = make_plan(config, train_size=len(dataset.train_samples), world_size=world.size)
            resolved = {**asdict(machine), "world_size": world.size}
            recorder = world.main_first(
                lambda main: open_recorder(config, main=main, command=command, resolved=resolved)
            )
            opened.callback(recorder.close, console)
            with runtime.memory_told(f"with {plan.micro_batch} images at a time a process; {plan.lighter()}"):
                run = Training(config, world, console, machine, plan, dataset, recorder, opened, stop_after)
                run.state.seconds["start-up"] += time.monotonic() - started
                try:
                    summary = run.loop()
                except Stopped:
                    world.leave()  # where that fails, it is told below
                    raise
            world.leave()
            return summary
        except Stopped as stopped:
            setattr(stopped, "told_elsewhere", not world.is_main)  # noqa: B010 - read by __main__, which prints
            raise
        except Exception as error:
            if world.size > 1:
                world.ignore_signals()  # the launcher sends one when another process is gone; first this one tells
            explained = world.explained(error)
            if recorder is not None:
                recorder.failed(explained)
            raise explained from (error if explained is not error else error.__cause__)


def _join(config: TrainConfig, world: World, at: Place) -> runtime.Runtime:
    """Meet the others, decide what to compute with, and agree with them: rank 0's precision is everybody's."""
    world.meet()
    check_batch(config, at.size)  # what can be known is told before anything is downloaded or converted
    chosen_architecture(config.arch, config.arch_opt)
    _optimizer(config)
    trackers.find(config.track)
    asked = runtime.decide(config, local_rank=at.local_rank, local_world=at.local_size)
    world.join(asked.backend)
    kept = world.from_main(lambda: resolved_before(config, at.size))
    machine = runtime.decide(config, local_rank=at.local_rank, local_world=at.local_size, kept=kept)
    machine = replace(machine, amp_dtype=world.from_main(lambda: machine.amp_dtype))
    runtime.apply(machine, deterministic=config.deterministic)
    return machine


class Training:
    """One run, set up, and where it stands. opened: takes what has to be closed."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        console: Console,
        machine: runtime.Runtime,
        plan: Plan,
        dataset: DataSet,
        recorder: Recorder,
        opened: ExitStack,
        stop_after: int | None,
    ) -> None:
        self.config, self.world, self.console, self.plan, self.recorder = config, world, console, plan, recorder
        self.dataset, self.split, self.stop_after = dataset, dataset.evaluation_split, stop_after
        for line in (*machine.why, *dataset.left_out, *plan.lines(config.lr)):
            console.line(line)
        self.learner = learner_for(config, self._network(machine))
        self.network = self.learner.network
        self.options = StepOptions.of(config, plan)
        parameters = sum(p.numel() for p in self.network.module.parameters())
        at = (self.network.dtype, self.network.device)
        self.loader = dataset.train_loader(config, plan, world.rank, *at)
        opened.callback(self.loader.close)
        self.chunks = dataset.chunks(config, world.rank, world.size, *at)
        opened.callback(self.chunks.loader.close)
        console.line(f"{config.arch}, {parameters:,} parameters; {config.opt}; {self.loader.told} reader")
        console.line(f"run directory {shown(recorder.path)}")
        self.state = self._resumed()
        # of this process since it was last read; the rest is in the state
        self.tally = Tally(self.network.device, plan.share, self.state.streak)
        self.clock = RunClock(config, plan)
        self.loader.start(self.state.step)  # opening and compiling is no training
        self.watch = Stopwatch(self.state.seconds, lambda: self.loader.wait_seconds)
        self.lap_samples = self.state.samples

    # -- the loop ------------------------------------------------------------------------------------------------------

    def loop(self) -> Summary:
        """Train to the end. Raises Stopped after a save that was asked for."""
        config, plan, state, world, clock = self.config, self.plan, self.state, self.world, self.clock
        learner = self.learner
        self.console.start(plan.total_steps, state.step)
        with world.listening():
            world.post(clock)
            if state.step == 0:
                self.save(essential=True)  # finds a full or unwritable disk before the work
            if state.eval_due:
                self.act(self.evaluate(Ask()))
            while state.step < plan.total_steps and not state.reached:
                batch = self.loader.batch(state.step)  # a function of (seed, step); prefetched
                set_lr(learner.optimizer, plan.lr_factor(state.samples))
                seed_step(config.seed, state.step, world.rank)  # torch, numpy, random: dropout and the like
                self.tally += train_step(
                    learner, batch, self.options, plan.epoch_at(state.step)
                )  # nothing is read here
                state.advance(plan.batch_size_at(state.step))
                ask = world.agreed(clock, state.step)  # signals and rank 0's clock: posted a step ago, read now
                if state.step == self.stop_after:
                    ask = Ask(stop=True)
                if plan.logs_at(state.step):
                    self.log()  # the only host sync
                if plan.evaluates_at(state.step):
                    ask = self.evaluate(ask)
                self.act(ask)
            return self.finish()

    def act(self, ask: Ask) -> None:
        """Save if it is due or asked for; raise Stopped if all have agreed to stop."""
        state = self.state
        over = state.step == self.plan.total_steps or state.reached
        if ask.save or ask.stop or over or self.plan.saves_at(state.step):
            self.save(essential=ask.stop or over)
        if ask.stop and (not over or state.eval_due):
            reason = self.clock.reason or self.world.stop_reason or "a signal to another process"
            again = "run the same command again"
            if self.config.resume != "auto":  # which would go back once more, or begin another run
                again = f"dtrain train --resume {shlex.quote(shown(self.recorder.path))}"
            self.recorder.event("stop", state.step, reason=reason)
            try:
                self.recorder.update(status="stopped", step=state.step, exit_code=Stopped.exit_code, reason=reason)
            except StorageError as error:  # the checkpoint is there, and that is what counts
                self.console.warn(f"saved, but: {error}")
            self.console.stop()
            self.console.table("stopped", [*self._seconds(), ("to go on", again)])
            raise Stopped(f"stopped at step {state.step} by {reason}, saved; to go on: {again}")

    def log(self) -> None:
        """Close the log interval: read the sums, write and show a row, begin the next. Collective, a host sync."""
        plan, state = self.plan, self.state
        sums = self.take()
        state.tally = None
        seconds, waited = self.watch.lap()
        images_per_second = (state.samples - self.lap_samples) / max(seconds, 1e-9)
        self.lap_samples = state.samples
        row = {
            "kind": "train",
            "step": state.step,
            "epoch": state.step / plan.steps_per_epoch,
            "samples": state.samples,
            "loss": sums.loss,
            "top1_fraction": sums.top1_fraction,
            "lr": self.config.lr * plan.lr_factor(state.samples - plan.batch_size),
            "images_in_interval": sums.images,
            "skipped_steps": sums.skipped_images // plan.batch_size,
            "checksum": sums.checksum,
            "clock": {
                "images_per_second": images_per_second,
                "data_wait_fraction": waited / max(seconds, 1e-9),
                "train_seconds": state.seconds["train"],
                "cpu_seconds": time.process_time(),
                "left_seconds": (plan.total_samples - state.samples) / max(images_per_second, 1e-9),
                "time": time.time(),
            },
        }
        self.recorder.row(row)
        self.console.train(row, plan.total_steps / plan.steps_per_epoch, plan.total_steps)

    def take(self) -> Sums:
        """The sums of the open log interval over all processes, kept in the state; the device's begin anew.

        Raises DivergedError on every process if a loss was not finite, or too many updates in a row were skipped.
        Collective, a host sync.
        """
        state, tally = self.state, self.tally
        new = self.world.total(tally.sums)
        sums, state.streak = Sums.of(state.add(new)), int(tally.streak)
        if Sums.of(new).nonfinite or Sums.of(new).skipped_images:
            self._tell_fault(Sums.of(new).skipped_images // self.plan.batch_size)
        tally.begin_anew()
        return sums

    def _tell_fault(self, skipped_steps: int) -> None:
        """Name the first step since the last read whose loss or gradient was not finite, and its samples. Collective.

        Raises DivergedError on every process unless its update was skipped, and so were few enough in a row.
        """
        fault, path = self.tally.first_fault(self.world), self.world.from_main(lambda: self.recorder.path)
        step, longest = self.state.step - fault.steps_ago, int(self.tally.longest)
        samples = self.dataset.train_samples[self.plan.batch(step - 1)[fault.positions]]
        what, look = told(step, samples.tolist()), f"dtrain replay {shlex.quote(shown(path))} --step {step}"
        advice = f"lower --lr, add --warmup-epochs or --clip-grad; to look at it: {look}"
        if not self.options.skip_nonfinite:
            raise DivergedError(f"{what}; the last checkpoint is from before it; {advice}")
        what = f"up to step {self.state.step}; {what}"
        if longest >= GIVE_UP_STEPS:
            raise DivergedError(f"{longest} updates in a row were skipped {what}; {advice}")
        self.console.warn(f"{skipped_steps} updates were skipped {what}; to look at it: {look}")

    def evaluate(self, asked: Ask) -> Ask:
        """Evaluate raw and EMA weights, write and show the rows; what is agreed meanwhile is added to `asked`.

        Asked to stop, it leaves the evaluation for the resume. Collective.
        """
        state, modules = self.state, {"raw": self.network.module}
        if self.learner.ema is not None:
            modules["ema"] = self.learner.ema.module
        state.eval_due = True
        if asked.stop:
            return asked
        if self.network.device.type == "cuda":
            torch.cuda.synchronize(self.network.device)  # what is queued is training
        images = min(self.config.eval_batch_size, len(self.dataset.evaluation_samples))
        advice = f"try --eval-batch-size {images // 2}, which is another run" if images > 1 else "use a smaller network"
        told = runtime.memory_told(f"in an evaluation of {images} images at a time; {advice}")
        with self.watch.away("eval"), told:
            results, ask = evaluate(self.network, modules, self.chunks, self.world, self.clock)
        state.eval_due = results is None
        for weights, sums in (results or {}).items():
            self._record_evaluation(weights, sums)
        return Ask(save=ask.save or asked.save, stop=ask.stop)

    def _record_evaluation(self, weights: str, sums: Sums) -> None:
        state = self.state
        row = {
            "kind": "eval",
            "step": state.step,
            "epoch": state.step / self.plan.steps_per_epoch,
            "samples": state.samples,
            "split": self.split,
            "weights": weights,
            "hits": sums.hits,
            "hits5": sums.hits5,
            "images": sums.images,
            "loss": sums.loss,
            "nonfinite_losses": sums.nonfinite,
            "clock": {"eval_seconds": state.seconds["eval"], "time": time.time()},
        }
        if state.best is None or sums.hits > state.best["hits"]:
            state.best = {key: row[key] for key in ("step", "split", "weights", "hits", "images")}
        if self.config.stop_at_accuracy is not None and sums.top1_fraction >= self.config.stop_at_accuracy:
            state.reached = True
        self.recorder.row(row)
        self.console.evaluation(row)
        if sums.nonfinite:
            self.console.warn(f"the loss of {sums.nonfinite} images is not finite and no part of the mean")

    def save(self, *, essential: bool) -> None:
        """Write the checkpoint of this step. Collective.

        A failure is told and tried again at the next point, unless the save is `essential`: the first and the last.
        """
        self.take()
        with self.watch.away("save"):
            if essential:
                self.world.from_main(self._write)
            else:
                try:
                    self._write()
                except StorageError as error:
                    self.console.warn(f"not saved: {error}; the older checkpoints stay, the next point tries again")
        self.clock.saved()

    def _write(self) -> None:
        folder, state = self.recorder.folder, self.state
        if folder is None:
            return
        counts = {**asdict(state), **self.learner.counts()}
        about: dict[str, Any] = {
            "config": self.config.settings(),
            **self.dataset.facts,
            "plugins": dict(self.recorder.record.plugins),
        }
        self.recorder.flush()
        path = checkpoint.save(folder.checkpoints, state.step, self.learner.parts(), counts, about)
        self.recorder.event("save", state.step)
        try:
            checkpoint.prune(folder.checkpoints, keep=self.config.keep, best=state.best["step"] if state.best else None)
            self.recorder.update(step=state.step, last_checkpoint=path.name)
        except StorageError as error:  # the checkpoint itself is there
            self.console.warn(f"saved, but: {error}")

    def finish(self) -> Summary:
        """Mark the run finished and show its table."""
        state, recorder = self.state, self.recorder
        evaluations, path = self.world.from_main(
            lambda: ({row["weights"]: row for row in recorder.rows() if row["kind"] == "eval"}, recorder.path)
        )
        recorder.event("finish", state.step)
        recorder.update(status="finished", step=state.step, exit_code=0, reason=None)
        self.console.stop()
        accuracies = [
            (f"{row['split']} accuracy, {weights} weights", f"{counted(row['hits'], row['images'])}")
            for weights, row in evaluations.items()
        ]
        best, last = [], max((row["hits"] for row in evaluations.values()), default=0)
        if state.best is not None and state.best["hits"] > last:
            note = ", picked on the test split: no fair figure" if state.best["split"] == "test" else ""
            figure = counted(state.best["hits"], state.best["images"])
            best = [(f"best, at step {state.best['step']}{note}", figure)]
        look = ("look at it", f"dtrain eval {shlex.quote(shown(path))}")
        self.console.table("finished", [*accuracies, *best, *self._seconds(), look])
        return Summary(path, "finished", state.step, evaluations, state.best, state.seconds)

    def _seconds(self) -> list[tuple[str, str]]:
        times = ", ".join(f"{kind} {span(value)}" for kind, value in self.state.seconds.items())
        return [("time", times), ("run directory", shown(self.recorder.path))]

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _network(self, machine: runtime.Runtime) -> Network:
        """The network, rehearsed: what is wrong with it is told now."""
        config, size, channels = self.config, self.dataset.image_size, self.dataset.channels
        classes = len(self.dataset.train.class_names)
        memory_format = layout(config.channels_last)
        noise = rehearsal.noise(config.seed, (2, channels, size, size), torch.float32, memory_format)

        def build(pixels: int) -> nn.Module:
            return module_of(config, num_classes=classes, in_channels=channels, image_size=pixels)

        with rehearsal.smallest_size_told(build, channels, size):
            module = build(size)
            if (told_mode := mode_told(module, config.arch)) is not None:
                self.console.warn(told_mode)
            # before DDP, which would hide a difference by sending rank 0's
            weights = rehearsal.digest_of(module.state_dict())
            self.world.same(weights, f"the initial network of architecture {config.arch}")
            head = prepare(config, module, noise, classes)
        moving = self.world.size > 1 and rehearsal.buffers_move_output(module, noise, config.seed)
        if moving:
            self.console.line("the training output depends on buffers: rank 0's are sent to the others at every step")
        network = network_of(config, machine, module, world_size=self.world.size, moving_buffers=moving, head=head)
        if config.compile:  # compiled for one shape: rehearse with the one that trains
            noise = noise.repeat(self.plan.micro_batch // 2 + 1, 1, 1, 1)[: self.plan.micro_batch]
        images = noise.to(network.device, machine.dtype(), memory_format=memory_format)
        rehearsal.rehearse(network, images, config.arch, classes, self.world)
        return network

    def _resumed(self) -> TrainState:
        """Go on from the newest sound checkpoint: rank 0 finds and reads it, the others get its bytes. Collective."""
        started, found = time.monotonic(), checkpoint.Found(None, [])

        def read() -> checkpoint.Checkpoint | None:
            nonlocal found
            if self.recorder.folder is None or self.config.resume == "none":
                return None
            asked = Path(self.config.resume)
            if asked.parent.name == checkpoint.FOLDER:
                checkpoint.undo_after(asked)
            found = checkpoint.newest(self.recorder.folder.checkpoints)
            return found.checkpoint

        saved = self.world.from_main(read)
        for path, reason in found.damaged:
            self.console.warn(f"damaged checkpoint set aside: {shown(path)}: {reason}")
        if saved is None:
            if self.recorder.folder is not None:
                self.recorder.folder.cut_back(0, evaluated=False)
            self.recorder.event("start", 0, processes=self.world.size)
            return TrainState()
        refuse_other_data(self.config.dataset, was=saved.about, asked=self.dataset.facts)
        counts: dict[str, Any] = dict(saved.state)
        self.learner.restore(saved.parts, counts)
        for kind, plugin in self.recorder.record.plugins.items():
            if plugin != (was := saved.about["plugins"].get(kind)):
                self.console.warn(f"{kind}: was {was}, is {plugin}; what follows need not be the run as it began")
        state = TrainState(**counts)
        if self.recorder.folder is not None:
            self.recorder.folder.cut_back(state.step, evaluated=not state.eval_due)
        self.recorder.event("resume", state.step, processes=self.world.size)
        self.console.line(f"goes on at step {state.step}, read in {time.monotonic() - started:.1f} s")
        return state


def module_of(config: TrainConfig, **sizes: int) -> nn.Module:
    """The module of a config's architecture for `num_classes`, `in_channels` and `image_size`, as `build_module`."""
    return build_module(config.arch, config.arch_opt, seed=config.seed, **sizes)


def network_of(
    config: TrainConfig,
    machine: runtime.Runtime,
    module: nn.Module,
    *,
    world_size: int = 1,
    moving_buffers: bool = False,
    head: tuple[str, ...] = (),
) -> Network:
    """The module wrapped as a config and a machine ask for (`wrap`). Collective for more than one process."""
    return wrap(
        module,
        device=machine.torch_device(),
        dtype=machine.dtype(),
        channels_last=config.channels_last,
        sync_bn=config.sync_bn,
        compiled=config.compile,
        world_size=world_size,
        moving_buffers=moving_buffers,
        head=head,
    )


def _optimizer(config: TrainConfig) -> Choice:
    """The optimizer that a config names. Raises what `chosen_optimizer` raises."""
    return chosen_optimizer(
        config.opt,
        config.opt_opt,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        given_by_hand=[f.name for f in settings_fields() if config.origin(f.name) in ("flag", "default")],
    )


def prepare(config: TrainConfig, module: nn.Module, images: Tensor, num_classes: int) -> tuple[str, ...]:
    """A first pass through a module as it was built, then freeze what `--freeze` freezes for good; returns the head.

    Raises PluginError where the pass gives no logits, UsageError for `--freeze`.
    """
    head = rehearsal.first_output(module, images, config.arch, num_classes)
    freeze(module, frozen_until(config.freeze or (), module))
    return head


def groups_of(config: TrainConfig, module: nn.Module, head: Sequence[str]) -> list[Group]:
    """The parameter groups of a config; head: names of the parameters that give the logits."""
    until = frozen_until(config.freeze or (), module)
    return grouped(module, lr=config.lr, head=head, until=until, layer_decay=config.layer_decay, head_lr=config.head_lr)


def optimizer_of(config: TrainConfig, module: nn.Module, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """The optimizer of a config over `groups` of a module's parameters. Raises what `build_optimizer` raises."""
    return build_optimizer(_optimizer(config), groups, module, lr=config.lr)


def learner_for(config: TrainConfig, network: Network) -> Learner:
    """The network with the optimizer, scaler and EMA that a config asks for. Raises what `build_optimizer` raises."""
    optimizer = optimizer_of(config, network.module, groups_of(config, network.module, network.head))
    return learner_of(network, optimizer, ema=config.ema, until=frozen_until(config.freeze or (), network.module))


def load_network(run: Path | str, step: int | None = None) -> nn.Module:
    """The network of a run's checkpoint (its last, or the one of `step`), in evaluation mode, on the CPU.

    Raises StorageError where there is none that is sound.
    """
    checkpoints = Path(run) / checkpoint.FOLDER
    if step is None:
        saved = checkpoint.find(checkpoints).checkpoint
    else:
        saved = checkpoint.load(checkpoints / checkpoint.name_of(step))
    if saved is None:
        raise StorageError(f"{run}: no sound checkpoint is there")
    about = saved.about
    config = TrainConfig.stored(about["config"])
    classes, channels, size = len(about["class_names"]), about["channels"], about["image_size"]
    module = module_of(config, num_classes=classes, in_channels=channels, image_size=size)
    module.load_state_dict(saved.parts["network"])
    return module.eval()
