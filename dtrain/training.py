"""train(config) -> Summary: set up, then the loop. The only file that sees every room."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dtrain import plugins, runtime
from dtrain.config import TrainConfig, parse_seconds, read_config
from dtrain.data.augment import Augmentation
from dtrain.data.beton import Beton, prepare
from dtrain.data.loader import Loader, Request, open_loader
from dtrain.errors import DivergedError, DtrainError, Stopped, StorageError, UsageError
from dtrain.keyed import stratified
from dtrain.model import rehearsal
from dtrain.model.evaluation import chunks_of, evaluate
from dtrain.model.metrics import FIELDS, Sums
from dtrain.model.network import Network, average_of, build_module, wrap
from dtrain.model.optimization import Packed, build_optimizer, pack, set_lr, unpack
from dtrain.model.step import StepOptions, seed_step, train_step
from dtrain.plan import Plan, make_plan
from dtrain.run import checkpoint
from dtrain.run.console import Console, counted, span
from dtrain.run.rundir import CONFIG, Record, RunDir, environment, open_run, read_record, read_rows, versions
from dtrain.world import Ask, World, place


@dataclass
class TrainState:
    """All that a run is beside its tensors: what a checkpoint's state.json holds."""

    step: int = 0  # updates done
    samples: int = 0  # images seen by all processes together
    tally: list[int] = field(default_factory=lambda: [0] * FIELDS)  # sums of the open log interval, over all processes
    best: dict[str, Any] | None = None  # step, split and counts of the best evaluation so far
    eval_due: bool = False  # an evaluation was left for a stop; the resume does it first
    reached: bool = False  # --stop-at-accuracy was met
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "eval": 0.0, "save": 0.0, "wait": 0.0, "start-up": 0.0}
    )

    def advance(self, batch_size: int) -> None:
        """One update is done."""
        self.step += 1
        self.samples += batch_size


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
    a signal then would. Raises DtrainError for all that dtrain can explain; Stopped after a save that was asked for.
    """
    at = place()
    world = World(at, config.dist_timeout)
    console = Console(at.is_main)
    try:
        return _train(config, world, console, list(command), stop_after)
    except Exception as error:
        raise _told_once(world, error) from error.__cause__
    finally:
        console.stop()


def _told_once(world: World, error: Exception) -> Exception:
    first = world.first_to_tell()
    explained = error if isinstance(error, DtrainError) else world.explain(error) or error
    setattr(explained, "told_elsewhere", not first)  # noqa: B010 - read by __main__, where errors are printed
    return explained


def _train(config: TrainConfig, world: World, console: Console, command: list[str], stop_after: int | None) -> Summary:
    started, at = time.monotonic(), place()
    plugins.find("architecture", config.arch)  # a wrong name is told before anything is downloaded or converted
    plugins.find("optimizer", config.opt)
    kept = _kept(config, at.size)
    machine = runtime.decide(config, local_rank=at.local_rank, local_world=at.local_size, kept=kept)
    runtime.apply(machine, deterministic=config.deterministic)
    if at.size > 1:
        world.join(at, machine.backend)
    betons = console.converting(prepare(config.dataset, config.data_dir, config.cache_dir, timeout_seconds=3600))
    world.same(betons["train"].sha256 + betons["test"].sha256, f"data set {config.dataset}")
    splits = _splits(config, betons)
    plan = make_plan(config, train_size=len(splits.train), world_size=world.size)
    opened: list[_Run] = []  # stays empty on the other ranks, which learn only whether it went well
    world.from_main(lambda: opened.append(_open(config, machine, plan, command)))
    run = opened[0] if opened else None
    try:
        with contextlib.ExitStack() as stack:
            job = _Job(config, world, console, machine, plan, betons, splits, run, stop_after)
            stack.callback(job.close)
            job.state.seconds["start-up"] += time.monotonic() - started
            summary = job.run_loop()
            world.leave()
            return summary
    except BaseException as error:
        if isinstance(error, Stopped):
            world.leave()
        elif run is not None:
            code = error.exit_code if isinstance(error, DtrainError) else 1
            with contextlib.suppress(StorageError):  # the error itself matters more than its record
                run.update(status="failed", exit_code=code, reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        if run is not None:
            run.folder.close()


# -- set-up ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Splits:
    train: npt.NDArray[np.int64]
    evaluation: npt.NDArray[np.int64]
    name: str  # "test", or "val" for a part of the training set


def _splits(config: TrainConfig, betons: dict[str, Beton]) -> _Splits:
    labels = betons["train"].labels
    if config.val_split is None:
        return _Splits(np.arange(len(labels)), np.arange(len(betons["test"].labels)), "test")
    held = stratified(labels, config.val_split, config.seed)
    return _Splits(np.flatnonzero(~held), np.flatnonzero(held), "val")


def _run_path(config: TrainConfig) -> Path:
    if config.resume not in ("auto", "none"):
        given = Path(config.resume)
        return given.parent.parent if given.parent.name == "checkpoints" else given
    return config.output or Path("runs") / config.run_name()


def _kept(config: TrainConfig, world_size: int) -> dict[str, object] | None:
    """What `auto` became when this run began, if it goes on with as many processes: a resume keeps it."""
    if config.resume == "none":
        return None
    record = read_record(_run_path(config))
    if record is None or record.resolved.get("world_size") != world_size:
        return None
    return dict(record.resolved)


@dataclass
class _Run:
    """The run directory and its record, on rank 0."""

    folder: RunDir
    record: Record

    def update(self, **changed: Any) -> None:
        """Change the record and write it."""
        self.record = replace(self.record, **changed)
        self.folder.write_record(self.record)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """An event row: start, resume, save, stop, finish."""
        self.folder.append({"kind": "event", "event": name, "step": step, **facts, "clock": {"time": time.time()}})


def _open(config: TrainConfig, machine: runtime.Runtime, plan: Plan, command: list[str]) -> _Run:
    path = _run_path(config)
    if config.resume not in ("auto", "none") and read_record(path) is None:
        raise UsageError(f"--resume {config.resume}: no run is there; give a run directory, auto or none")
    folder = open_run(path, path.parent, path.name, fresh=config.resume == "none")
    before = read_record(folder.path)
    if before is not None:
        _refuse_other_settings(folder, config)
    folder.write_config(config.settings())
    found = (plugins.find("architecture", config.arch), plugins.find("optimizer", config.opt))
    record = Record(
        status="running",
        step=before.step if before else 0,
        last_checkpoint=before.last_checkpoint if before else None,
        command=command,
        environment=environment(),
        versions=versions(),
        resolved={**asdict(machine), "world_size": plan.world_size},
        plugins={plugin.kind: f"{plugin.distribution} {plugin.version}" for plugin in found},
    )
    run = _Run(folder, record)
    run.update()
    return run


def _refuse_other_settings(folder: RunDir, config: TrainConfig) -> None:
    was, asked = TrainConfig.stored(read_config(folder.path / CONFIG)).results(), config.results()
    names = sorted(name for name in {*was, *asked} if was.get(name) != asked.get(name))
    if names:
        folder.close()
        told = "; ".join(f"{name}: was {was.get(name)}, asked {asked.get(name)}" for name in names)
        raise UsageError(f"{folder.path} holds a run with other settings ({told}); give another --output")


class _Clock:
    """Rank 0's wishes that depend on time or on `stop_after`."""

    def __init__(self, config: TrainConfig, plan: Plan, state: TrainState, stop_after: int | None) -> None:
        self._state, self._stop_after = state, stop_after
        self._save_seconds = plan.save_every.seconds
        self._limit = parse_seconds(config.max_time, "--max-time") if config.max_time else None
        self._started = self._saved = time.monotonic()
        self.reason = ""

    def saved(self) -> None:
        """A checkpoint has just been written."""
        self._saved = time.monotonic()

    def ask(self) -> Ask:
        """What is due; asked one step before it is acted on."""
        now = time.monotonic()
        save = self._save_seconds is not None and now - self._saved >= self._save_seconds
        stop = self._stop_after is not None and self._state.step + 1 >= self._stop_after
        if self._limit is not None and now - self._started >= self._limit:
            stop, self.reason = True, "--max-time"
        return Ask(save=save, stop=stop)


class _Job:
    """One run, set up: what the loop works on."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        console: Console,
        machine: runtime.Runtime,
        plan: Plan,
        betons: dict[str, Beton],
        splits: _Splits,
        run: _Run | None,
        stop_after: int | None,
    ) -> None:
        self.config, self.world, self.console, self.plan, self.run = config, world, console, plan, run
        self.splits, self.class_names = splits, betons["train"].class_names
        self.channels, self.image_size = betons["train"].channels, betons["train"].image_size
        for line in (*machine.why, *plan.lines(config.lr)):
            console.line(line)
        self.state = TrainState()
        self.network = self._network(machine, betons["train"])
        self.optimizer = build_optimizer(config, self.network.module)
        self.scaler = torch.amp.GradScaler(self.network.device.type, enabled=self.network.dtype == torch.float16)
        self.ema = average_of(self.network.module, config.ema)
        self.options = StepOptions(plan.micro_batch, config.smoothing, config.clip_grad)
        self._resume()
        self.clock = _Clock(config, plan, self.state, stop_after)
        self.loader = self._train_loader(betons["train"])
        self.requests = chunks_of(splits.evaluation, config.eval_batch_size, world)
        self.eval_loader = self._eval_loader(betons["train" if splits.name == "val" else "test"], betons["train"])
        console.line(f"reader {self.loader.kind}; run {run.folder.path if run else ''}")

    def _network(self, machine: runtime.Runtime, beton: Beton) -> Network:
        config, size, classes = self.config, beton.image_size, len(self.class_names)
        module = build_module(config, num_classes=classes, in_channels=beton.channels, image_size=size)
        noise = rehearsal.noise(config.seed, (2, beton.channels, size, size), torch.float32)
        rehearsal.first_output(module, noise, config.arch, classes)
        moving = self.world.size > 1 and rehearsal.buffers_move_output(module, noise, config.seed)
        network = wrap(module, config, machine, self.world, moving_buffers=moving)
        if config.compile:  # compiled for one shape: rehearse with the one that trains
            noise = noise.repeat(self.plan.micro_batch // 2 + 1, 1, 1, 1)[: self.plan.micro_batch]
        images = noise.to(network.device, machine.dtype(), memory_format=torch.channels_last)
        rehearsal.rehearse(network, images, config.arch, classes, self.world)
        return network

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint: rank 0 finds and reads it, the others get its bytes."""
        found: list[str] = []

        def read() -> checkpoint.Checkpoint | None:
            if self.run is None or self.config.resume == "none":
                return None
            newest = checkpoint.newest(self.run.folder.checkpoints)
            found.extend(f"{path}: {reason}" for path, reason in newest.damaged)
            return checkpoint.load(newest.path) if newest.path is not None else None

        saved = self.world.from_main(read)
        for line in found:
            self.console.warn(f"damaged checkpoint set aside: {line}")
        if saved is None:
            self._main(lambda run: run.event("start", 0))
            return
        started = time.monotonic()
        extra: dict[str, Any] = dict(saved.state)
        packed = Packed(saved.parts.get("optimizer", {}), extra.pop("optimizer"))
        scaler, average_count = extra.pop("scaler"), extra.pop("ema_updates")
        self.network.load(saved.parts["network"])
        unpack(self.optimizer, self.network.module, packed)
        self.scaler.load_state_dict(scaler)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.parts["ema"])
            self.ema.n_averaged.fill_(average_count)
        self.state = TrainState(**extra)
        self._main(lambda run: run.folder.cut_back(self.state.step))
        self._main(lambda run: run.event("resume", self.state.step))
        self.console.line(f"resumed at step {self.state.step} in {time.monotonic() - started:.1f} s")

    def _train_loader(self, beton: Beton) -> Loader:
        config, samples = self.config, self.splits.train

        def request_at(step: int) -> Request | None:
            if step >= self.plan.total_steps:
                return None
            return Request(samples[self.plan.share_of(step, self.world.rank)], self.plan.epoch_at(step))

        augmentation = Augmentation(config.seed, config.flip, config.shift, config.cutout)
        return self._open_loader(beton, beton, request_at, augmentation, self.plan.share)

    def _eval_loader(self, beton: Beton, train: Beton) -> Loader:
        return self._open_loader(beton, train, self.requests[1], None, self.config.eval_batch_size)

    def _open_loader(
        self, beton: Beton, train: Beton, request_at: Any, augmentation: Augmentation | None, largest: int
    ) -> Loader:
        return open_loader(
            beton,
            request_at,
            kind=self.config.loader,
            augmentation=augmentation,
            mean=self.config.mean or train.mean,
            std=self.config.std or train.std,
            dtype=self.network.dtype,
            device=self.network.device,
            largest=largest,
        )

    def close(self) -> None:
        """Give threads back."""
        for loader in ("loader", "eval_loader"):
            if hasattr(self, loader):
                getattr(self, loader).close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run_loop(self) -> Summary:
        """Train to the end; see the verbs below. Raises Stopped after a save that was asked for."""
        config, plan, state, world, clock = self.config, self.plan, self.state, self.world, self.clock
        network, optimizer, scaler, ema = self.network, self.optimizer, self.scaler, self.ema
        tally = torch.zeros(FIELDS, dtype=torch.int64, device=network.device)
        self.console.start(plan.total_steps, state.step)
        self.interval = _Interval(self.loader)
        with world.listening():
            world.post(clock)
            if state.step == 0:
                self.save(tally)  # finds a full or unwritable disk before the work
            if state.eval_due:
                self.act(self.evaluate(Ask()), tally)
            while state.step < plan.total_steps and not state.reached:
                batch = self.loader.batch(state.step)  # a function of (seed, step); prefetched
                set_lr(optimizer, plan.lr_factor(state.samples))
                seed_step(config.seed, state.step, world.rank)  # torch, numpy, random: dropout and the like
                tally += train_step(network, optimizer, scaler, ema, batch, self.options)  # nothing is read here
                state.advance(plan.batch_size_at(state.step))
                ask = world.agreed(clock)  # signals and rank 0's clock: posted a step ago, read now
                if plan.logs_at(state.step):
                    self.log(tally)  # the only host sync
                if plan.evaluates_at(state.step) and not ask.stop:
                    ask = self.evaluate(ask)
                elif plan.evaluates_at(state.step):
                    state.eval_due = True
                self.act(ask, tally)
        return self.finish(tally)

    def act(self, ask: Ask, tally: Tensor) -> None:
        """Save if it is due or asked for; raise Stopped if all have agreed to stop."""
        finished = self.state.step == self.plan.total_steps or self.state.reached
        if ask.save or ask.stop or self.plan.saves_at(self.state.step) or finished:
            self.save(tally, last=ask.stop or finished)
        if ask.stop and not (finished and not self.state.eval_due):
            reason = self.clock.reason or self.world.stop_reason or "a signal to another process"
            self._main(lambda run: run.event("stop", self.state.step, reason=reason))
            self._main(lambda run: run.update(status="stopped", step=self.state.step, exit_code=75, reason=reason))
            raise Stopped(f"stopped at step {self.state.step} by {reason}, saved; run the same command to go on")

    def log(self, tally: Tensor) -> None:
        """Close the log interval: read the sums, write and show a row, begin the next. Collective, a host sync."""
        sums = self.take(tally)
        self.state.tally = [0] * FIELDS
        train_seconds, waited = self.interval.close(self.state)
        rate = self.plan.lr_factor(self.state.samples - self.plan.batch_size) * self.config.lr
        speed = self.interval.images / max(train_seconds, 1e-9)
        self.interval.images = 0
        row = {
            "kind": "train",
            "step": self.state.step,
            "epoch": self.state.step / self.plan.steps_per_epoch,
            "samples": self.state.samples,
            "loss": sums.loss,
            "top1_fraction": sums.top1_fraction,
            "lr": rate,
            "images_in_interval": sums.images,
            "clock": {
                "images_per_second": speed,
                "data_wait_fraction": waited / max(train_seconds, 1e-9),
                "train_seconds": self.state.seconds["train"],
                "cpu_seconds": time.process_time(),
                "left_seconds": (self.plan.total_samples - self.state.samples) / max(speed, 1e-9),
                "time": time.time(),
            },
        }
        self._main(lambda run: run.folder.append(row))
        self.console.train(row, self.plan.total_steps / self.plan.steps_per_epoch, self.plan.total_steps)

    def take(self, tally: Tensor) -> Sums:
        """The sums of the open interval over all processes, kept in the state; the device's begin anew.

        Raises DivergedError on every process if a loss was not finite.
        """
        total = self.world.total(tally)
        tally.zero_()
        before = sum(self.state.tally[:1])
        self.state.tally = [a + b for a, b in zip(self.state.tally, total, strict=True)]
        self.interval.images += self.state.tally[0] - before
        sums = Sums.of(self.state.tally)
        if sums.nonfinite:
            raise DivergedError(
                f"{sums.nonfinite} losses were not finite in the steps up to {self.state.step}; lower --lr, add "
                "--warmup-epochs or --clip-grad; the last checkpoint is from before it"
            )
        return sums

    def evaluate(self, before: Ask) -> Ask:
        """Evaluate raw and EMA weights, write and show the rows; what was agreed meanwhile is added to `before`."""
        self.interval.close(self.state)
        modules: dict[str, nn.Module] = {"raw": self.network.module}
        if self.ema is not None:
            modules["ema"] = self.ema.module
        with _timed(self.state.seconds, "eval"):
            results, ask = evaluate(self.network, modules, self.eval_loader, self.requests, self.world, self.clock)
        self.state.eval_due = results is None
        for weights, sums in (results or {}).items():
            self._record_evaluation(weights, sums)
        self.interval.start()
        return Ask(save=ask.save or before.save, stop=ask.stop or before.stop)

    def _record_evaluation(self, weights: str, sums: Sums) -> None:
        state = self.state
        row = {
            "kind": "eval",
            "step": state.step,
            "epoch": state.step / self.plan.steps_per_epoch,
            "samples": state.samples,
            "split": self.splits.name,
            "weights": weights,
            "hits": sums.hits,
            "hits5": sums.hits5,
            "images": sums.images,
            "loss": sums.loss,
            "clock": {"eval_seconds": state.seconds["eval"], "time": time.time()},
        }
        if state.best is None or sums.hits > state.best["hits"]:
            state.best = {k: row[k] for k in ("step", "split", "weights", "hits", "images")}
        if self.config.stop_at_accuracy is not None and sums.top1_fraction >= self.config.stop_at_accuracy:
            state.reached = True
        self._main(lambda run: run.folder.append(row))
        self.console.evaluation(row)

    def save(self, tally: Tensor, *, last: bool = False) -> None:
        """Write the checkpoint of this step. A failure is told and tried again at the next, but for the last one."""
        self.interval.close(self.state)
        with _timed(self.state.seconds, "save"):
            self.take(tally)
            essential = last or self.state.step == 0
            if essential:
                self.world.from_main(self._write)
            elif self.run is not None:
                try:
                    self._write()
                except StorageError as error:
                    self.console.warn(f"not saved: {error}; the older checkpoints stay, the next point tries again")
        self.clock.saved()
        self.interval.start()

    def _write(self) -> None:
        if self.run is None:
            return
        packed = pack(self.optimizer, self.network.module)
        parts: dict[str, dict[str, Tensor]] = {"network": self.network.tensors(), "optimizer": packed.tensors}
        if self.ema is not None:
            parts["ema"] = dict(self.ema.module.state_dict())
        state: dict[str, Any] = {
            **asdict(self.state),
            "optimizer": packed.scalars,
            "scaler": self.scaler.state_dict(),
            "ema_updates": int(self.ema.n_averaged) if self.ema is not None else 0,
        }
        about: dict[str, Any] = {
            "config": self.config.settings(),
            "class_names": list(self.class_names),
            "channels": self.channels,
            "image_size": self.image_size,
            "train_size": self.plan.train_size,
            "plugins": dict(self.run.record.plugins),
        }
        self.run.folder.sync()
        path = checkpoint.save(self.run.folder.checkpoints, self.state.step, parts, state, about)
        best = self.state.best["step"] if self.state.best else None
        checkpoint.prune(self.run.folder.checkpoints, keep=self.config.keep, best=best)
        self.run.event("save", self.state.step)
        self.run.update(step=self.state.step, last_checkpoint=path.name)

    def finish(self, tally: Tensor) -> Summary:
        """Mark the run finished and show its table."""
        evaluations: dict[str, dict[str, Any]] = {}
        if self.run is not None:
            evaluations = {r["weights"]: r for r in read_rows(self.run.folder.path) if r["kind"] == "eval"}
            self.run.event("finish", self.state.step)
            self.run.update(status="finished", step=self.state.step, exit_code=0, reason=None)
        path = self.run.folder.path if self.run is not None else _run_path(self.config)
        summary = Summary(path, "finished", self.state.step, evaluations, self.state.best, self.state.seconds)
        self.console.stop()
        self.console.table("finished", _summary_rows(summary))
        return summary

    def _main(self, work: Any) -> None:
        if self.run is not None:
            work(self.run)


class _Interval:
    """Training seconds and the wait for data since the last stop of the clock, without evaluations and saves."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._seconds = self._waited = 0.0
        self.images = 0
        self.start()

    def start(self) -> None:
        """Run on."""
        self._begun, self._wait_begun = time.monotonic(), self._loader.wait_seconds
        self._open = True

    def close(self, state: TrainState) -> tuple[float, float]:
        """Stop, and add what ran to the state; returns train and wait seconds since the last log. Runs on."""
        now, waited = time.monotonic(), self._loader.wait_seconds
        train, wait = now - self._begun, waited - self._wait_begun
        state.seconds["train"] += train
        state.seconds["wait"] += wait
        self._begun, self._wait_begun = now, waited
        return train, wait


@contextlib.contextmanager
def _timed(seconds: dict[str, float], kind: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[kind] += time.monotonic() - started


def _summary_rows(summary: Summary) -> list[tuple[str, str]]:
    rows = []
    for weights, row in summary.evaluations.items():
        name = f"{row['split']} accuracy" + ("" if weights == "raw" else f" ({weights} weights)")
        rows.append((name, f"{counted(row['hits'], row['images'])} at step {row['step']}"))
    if summary.best is not None and summary.best["step"] != summary.step:
        note = " (picked on the test split: not a fair figure)" if summary.best["split"] == "test" else ""
        rows.append(
            ("best", f"{counted(summary.best['hits'], summary.best['images'])} at step {summary.best['step']}{note}")
        )
    rows.append(("seconds", ", ".join(f"{kind} {span(value)}" for kind, value in summary.seconds.items())))
    rows.append(("run directory", str(summary.run)))
    rows.append(("look at it", f"dtrain eval {shlex.quote(str(summary.run))}"))
    return rows


def load_network(run: Path | str, step: int | None = None) -> nn.Module:
    """The network of a run's checkpoint (its last, or the one of `step`), in evaluation mode, on the CPU.

    Raises StorageError where there is none that is sound.
    """
    checkpoints = Path(run) / "checkpoints"
    found = checkpoint.find(checkpoints).path if step is None else checkpoints / checkpoint.name_of(step)
    if found is None:
        raise StorageError(f"{run}: no sound checkpoint is there")
    saved = checkpoint.load(found)
    about = saved.about
    config = TrainConfig.stored(about["config"])
    classes, channels, size = len(about["class_names"]), about["channels"], about["image_size"]
    module = build_module(config, num_classes=classes, in_channels=channels, image_size=size)
    module.load_state_dict(saved.parts["network"])
    return module.eval()


__all__ = ["Summary", "TrainState", "load_network", "train"]
