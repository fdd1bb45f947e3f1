"""train(config) -> Summary: set up a run, then execute its training loop.

train      joins the process group, builds the parts of the run (assembly.py), and reports errors
Training   one run that is set up: `loop` is the whole training loop, and the methods below it are its operations
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dtrain import assembly, runtime
from dtrain.assembly import Parts
from dtrain.errors import DivergedError, ExitCode, Stopped, StorageError
from dtrain.model.evaluation import evaluate
from dtrain.model.metrics import Sums, Tally
from dtrain.model.nonfinite import GIVE_UP_STEPS, told
from dtrain.model.optimization import set_lr
from dtrain.model.step import seed_step, train_step
from dtrain.run import checkpoint
from dtrain.run.console import Console, shown
from dtrain.run.recorder import Recorder, refuse_other_data, resolved_before
from dtrain.run.rows import Best, EvalClock, EvalRow, TrainClock, TrainRow
from dtrain.run.state import RunClock, Stopwatch, TrainState, read_state
from dtrain.settings import identity
from dtrain.settings.config import TrainConfig
from dtrain.world import Ask, Place, World, place, signals_as_before


@dataclass(frozen=True)
class Summary:
    """The result of a run. evaluations: the last evaluation row of each kind of weights ("raw", "ema")."""

    run: Path
    status: str
    step: int
    evaluations: dict[str, EvalRow]
    best: Best | None
    seconds: dict[str, float]


def train(config: TrainConfig, *, command: Sequence[str] = (), stop_after: int | None = None) -> Summary:
    """Train `config` to its end, resuming from its run directory if that holds a checkpoint.

    Under torchrun every process calls this. stop_after: once this many updates are done, save, stop and raise Stopped,
    as if a signal had arrived then. command: the command line, which is recorded. The process of a command ends with
    the run, so signals stay ignored after a stop, because a late one must not change the exit code. Without a command,
    the previous signal handlers are restored.
    Raises DtrainError for every error that dtrain can explain, and Stopped after a requested stop has been saved.
    """
    started, at = time.monotonic(), place()
    world, console = World(at, config.machine.dist_timeout), Console(at.is_main)
    with ExitStack() as opened:  # closed in reverse order: the readers, the run directory, the progress bar
        if not command:
            opened.enter_context(signals_as_before())
        opened.callback(console.stop)
        recorder = None
        try:
            machine = _join(config, world, at)
            with runtime.memory_told("while the data set was prepared; it needs a larger machine"):
                dataset = assembly.dataset_of_all(config, world, console)
            plan = assembly.plan_of(config, **dataset.sizes, world_size=world.size)
            resolved = {**asdict(machine), "world_size": world.size}
            recorder = world.main_first(
                lambda main: assembly.recorder_of(config, main=main, command=command, resolved=resolved)
            )
            opened.callback(recorder.close, console)
            with runtime.memory_told(f"with {plan.largest_micro_batch} images at a time a process; {plan.lighter()}"):
                parts = assembly.parts_of(config, machine, dataset, plan, world, console)
                opened.callback(parts.close)
                run = Training(parts, world, console, recorder, stop_after)
                run.state.seconds["start-up"] += time.monotonic() - started
                try:
                    summary = run.loop()
                except Stopped:
                    world.leave()  # if this fails, the handler below reports the error
                    raise
            world.leave()
            return summary
        except Stopped:
            raise
        except Exception as error:
            if world.size > 1:
                world.ignore_signals()  # the launcher sends one when another process ends; report this error first
            explained = world.explained(error)
            if recorder is not None:
                recorder.failed(explained)
            raise explained from explained.__cause__


def _join(config: TrainConfig, world: World, at: Place) -> runtime.Runtime:
    """Meet the other processes, reject invalid settings early, and agree on the runtime to use. Collective."""
    world.meet()
    assembly.check(config, at.size)
    world.join(assembly.machine_of(config, at).backend)
    path, fresh = identity.run_path(config), config.run.resume == "none"
    kept = world.from_main(lambda: resolved_before(path, fresh=fresh, world_size=at.size))
    return assembly.agreed_machine(config, at, world, kept)


class Training:
    """One run that is set up, and its progress. stop_after: the step after which it stops as if a signal had come."""

    def __init__(
        self, parts: Parts, world: World, console: Console, recorder: Recorder, stop_after: int | None
    ) -> None:
        self.parts, self.world, self.console, self.recorder = parts, world, console, recorder
        self.config, self.plan, self.dataset, self.learner = parts.config, parts.plan, parts.dataset, parts.learner
        self.network, self.loader, self.stop_after = parts.learner.network, parts.loader, stop_after
        console.line(f"run directory {shown(recorder.path)}")
        self.state = self._resumed()
        # this process's sums since they were last read; sums that were read earlier are part of the state
        self.tally = Tally(self.network.device, self.plan.largest_share, self.state.streak)
        limit = self.config.run.max_time
        self.clock = RunClock(self.plan.save_every.seconds, limit.seconds if limit is not None else None)
        self.loader.start(self.state.step)  # now, so that opening and compiling do not count as training time
        self.watch = Stopwatch(self.state.seconds, lambda: self.loader.wait_seconds)
        self.lap_samples, self.rate = self.state.samples, assembly.choice_of(self.config).lr

    # -- the loop ------------------------------------------------------------------------------------------------------

    def loop(self) -> Summary:
        """Train to the end of the run. If a stop is requested, save a checkpoint and raise Stopped."""
        seed, plan, state, world, clock = self.config.run.seed, self.plan, self.state, self.world, self.clock
        learner, options, device = self.learner, self.parts.options, self.network.device
        self.console.start(plan.total_steps, state.step)
        with world.listening():
            world.post(clock)
            if state.step == 0:
                self.save(essential=True)  # a disk that is full or not writable is found before the work
            if state.eval_due:
                self.act(self.evaluate(Ask()))
            while state.step < plan.total_steps and not state.reached:
                now = plan.at(state.step)  # epoch, shares of the batch, image size, rate: a function of the step
                batch = self.loader.batch(state.step)  # a function of (seed, step); made ahead of time
                set_lr(learner.optimizer, now.lr_factor)
                seed_step(seed, state.step, world.rank, device)  # dropout and the like: torch, numpy, random
                self.tally += train_step(learner, batch, options, now.shares[world.rank], now.epoch)  # nothing is read
                state.advance(now.batch_size)
                ask = world.agreed(clock, state.step)  # signals and process 0's clock, as of the step before
                if state.step == self.stop_after:
                    ask = Ask(stop=True)
                if plan.logs_at(state.step):
                    self.log()  # the only host sync
                if plan.evaluates_at(state.step):
                    ask = self.evaluate(ask)
                self.act(ask)
            return self.finish()

    def act(self, ask: Ask) -> None:
        """Save if a checkpoint is due or asked for; then raise Stopped if the processes have agreed to stop."""
        state = self.state
        over = state.step == self.plan.total_steps or state.reached
        if ask.save or ask.stop or over or self.plan.saves_at(state.step):
            self.save(essential=ask.stop or over)
        if ask.stop and (not over or state.eval_due):
            reason = self.clock.reason or self.world.stop_reason or "a signal to another process"
            reason = "stop_after" if state.step == self.stop_after else reason
            again = "run the same command again"
            if self.config.run.resume != "auto":  # the same command would go back once more, or start another run
                again = f"dtrain train --resume {shlex.quote(shown(self.recorder.path))}"
            self.recorder.event("stop", state.step, reason=reason)
            try:
                self.recorder.update(status="stopped", step=state.step, exit_code=ExitCode.STOPPED, reason=reason)
            except StorageError as error:  # the checkpoint itself was written
                self.console.warn(f"saved, but: {error}")
            self.console.stop()
            self.console.stopped(state.seconds, self.recorder.path, again)
            line = f"stopped at step {state.step} by {reason}, saved; to go on: {again}"
            raise Stopped(line, told_elsewhere=not self.world.is_main)

    def log(self) -> None:
        """End the log interval: sum it over all processes, write and show its row. Collective, with a host sync."""
        plan, state = self.plan, self.state
        sums = self.take()
        state.tally = None
        seconds, waited = self.watch.lap()
        images_per_second = (state.samples - self.lap_samples) / max(seconds, 1e-9)
        self.lap_samples = state.samples
        clock = TrainClock(
            images_per_second=images_per_second,
            data_wait_fraction=waited / max(seconds, 1e-9),
            train_seconds=state.seconds["train"],
            cpu_seconds=time.process_time(),
            left_seconds=(plan.total_samples - state.samples) / max(images_per_second, 1e-9),
            time=time.time(),
        )
        row = TrainRow(
            step=state.step,
            epoch=plan.epochs_done(state.step),
            samples=state.samples,
            loss=sums.loss,
            top1_fraction=sums.top1_fraction,
            lr=self.rate * plan.at(state.step - 1).lr_factor,
            images_in_interval=sums.images,
            skipped_steps=sums.skipped_steps,
            checksum=sums.checksum,
            clock=clock,
        )
        self.recorder.row(row)
        self.console.train(row, plan.epochs_done(plan.total_steps), plan.total_steps)

    def take(self) -> Sums:
        """Add the new sums of all processes to the open log interval, and return the sums of that interval.

        Raises DivergedError on every process if a loss was not finite, or if too many updates in a row were skipped.
        Collective, with a host sync.
        """
        state, tally = self.state, self.tally
        new = self.world.total(tally.sums)
        sums, state.streak = Sums.of(state.add(new)), int(tally.streak)
        if Sums.of(new).nonfinite or Sums.of(new).skipped_steps:
            self._tell_fault(Sums.of(new).skipped_steps)
        tally.begin_anew()
        return sums

    def _tell_fault(self, skipped_steps: int) -> None:
        """Name the first step since the last read whose loss or gradient was not finite, and its samples.

        Collective. Raises DivergedError on every process unless faulty updates are to be skipped and fewer than
        GIVE_UP_STEPS of them came in a row. skipped_steps: the number of updates skipped since the last read.
        """
        fault = self.tally.first_fault(self.world, self.plan, self.state.step)
        path, longest = self.world.from_main(lambda: self.recorder.path), int(self.tally.longest)
        samples = self.dataset.train_samples[self.plan.batch(fault.step - 1)[fault.positions]]
        what, look = told(fault.step, samples.tolist()), f"dtrain replay {shlex.quote(shown(path))} --step {fault.step}"
        advice = f"lower --lr, add --warmup-epochs or --clip-grad; to look at it: {look}"
        if not self.parts.options.skip_nonfinite:
            raise DivergedError(f"{what}; the last checkpoint is from before it; {advice}")
        what = f"up to step {self.state.step}; {what}"
        if longest >= GIVE_UP_STEPS:
            raise DivergedError(f"{longest} updates in a row were skipped {what}; {advice}")
        self.console.warn(f"{skipped_steps} updates were skipped {what}; to look at it: {look}")

    def evaluate(self, asked: Ask) -> Ask:
        """Evaluate the raw and the EMA weights, write and show their rows. Collective.

        Returns `asked`, merged with any request that arrived meanwhile. If the run is to stop, the evaluation is left
        to the resume.
        """
        state, modules = self.state, {"raw": self.network.module}
        if self.learner.ema is not None:
            modules["ema"] = self.learner.ema.module
        state.eval_due = True
        if asked.stop:
            return asked
        if self.network.device.type == "cuda":
            torch.cuda.synchronize(self.network.device)  # count the work that is still queued as training time
        images = min(self.config.evaluation.eval_batch_size, len(self.dataset.evaluation_samples))
        advice = f"try --eval-batch-size {images // 2}, which is another run" if images > 1 else "use a smaller network"
        told = runtime.memory_told(f"in an evaluation of {images} images at a time; {advice}")
        with self.watch.away("eval"), told:
            results, ask = evaluate(self.network, modules, self.parts.chunks, self.world, self.clock)
        state.eval_due = results is None
        for weights, sums in (results or {}).items():
            self._record_evaluation(weights, sums)
        return Ask(save=ask.save or asked.save, stop=ask.stop)

    def _record_evaluation(self, weights: str, sums: Sums) -> None:
        state = self.state
        row = EvalRow(
            step=state.step,
            epoch=self.plan.epochs_done(state.step),
            samples=state.samples,
            split=self.dataset.evaluation_split,
            weights=weights,
            hits=sums.hits,
            hits5=sums.hits5,
            images=sums.images,
            loss=sums.loss,
            nonfinite_losses=sums.nonfinite,
            clock=EvalClock(state.seconds["eval"], time.time()),
        )
        if state.best is None or sums.hits > state.best.hits:
            state.best = Best(row.step, row.split, row.weights, row.hits, row.images)
        if (bar := self.config.evaluation.stop_at_accuracy) is not None and sums.top1_fraction >= bar:
            state.reached = True
        self.recorder.row(row)
        self.console.evaluation(row)
        if sums.nonfinite:
            self.console.warn(f"the loss of {sums.nonfinite} images is not finite and no part of the mean")

    def save(self, *, essential: bool) -> None:
        """Write the checkpoint of this step. Collective.

        A failed save gives a warning, and the next save that is due tries again. The first and the last save are
        `essential`: if one of them fails, every process raises StorageError.
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
        if self.recorder.folder is None:
            return
        state, recorder = self.state, self.recorder
        about = {"config": self.config.settings(), **self.dataset.facts, "plugins": dict(recorder.record.plugins)}
        counts = {"run": asdict(state), "learner": self.learner.counts()}
        best = state.best.step if state.best is not None else None
        keep = self.config.run.keep
        if (
            warning := recorder.save(state.step, self.learner.parts(), counts, about, keep=keep, best=best)
        ) is not None:
            self.console.warn(warning)

    def finish(self) -> Summary:
        """Record that the run is finished, and show its table of results."""
        state, recorder = self.state, self.recorder
        evaluations, path = self.world.from_main(
            lambda: ({row.weights: row for row in recorder.rows() if isinstance(row, EvalRow)}, recorder.path)
        )
        recorder.event("finish", state.step)
        recorder.update(status="finished", step=state.step, exit_code=ExitCode.DONE, reason=None)
        self.console.stop()
        self.console.finished(list(evaluations.values()), state.best, state.seconds, path)
        return Summary(path, "finished", state.step, evaluations, state.best, state.seconds)

    def _resumed(self) -> TrainState:
        """Resume from the newest undamaged checkpoint, which rank 0 reads and sends to the other ranks. Collective."""
        started, damaged = time.monotonic(), list[tuple[Path, str]]()

        def read() -> checkpoint.Checkpoint | None:
            found = self.recorder.newest(self.config.run.resume)
            damaged.extend(found.damaged)
            return found.checkpoint

        saved = self.world.from_main(read)
        for path, reason in damaged:
            self.console.warn(f"damaged checkpoint set aside: {shown(path)}: {reason}")
        if saved is None:
            self.recorder.cut_back(0, evaluated=False)
            self.recorder.event("start", 0, processes=self.world.size)
            return TrainState()
        refuse_other_data(self.config.data.dataset, was=saved.about, asked=self.dataset.facts)
        state, counts = read_state(saved.state)
        self.learner.restore(saved.parts, counts)
        for kind, plugin in self.recorder.record.plugins.items():
            if plugin != (was := saved.about["plugins"].get(kind, plugin)):
                self.console.warn(f"{kind}: was {was}, is {plugin}; what follows need not be the run as it began")
        self.recorder.cut_back(state.step, evaluated=not state.eval_due)
        self.recorder.event("resume", state.step, processes=self.world.size)
        self.console.line(f"goes on at step {state.step}, read in {time.monotonic() - started:.1f} s")
        return state
