"""The plan of a run: every number that follows from its settings. Pure functions, without torch, data or processes.

make_plan(...) -> Plan    from a handful of settings, the size of the training set and the number of processes
Plan.at(step)  -> Now     what may change from step to step: batch size, image size, shares and learning rate
Share                     the part of a step's batch that one process computes, and its micro-batches

Steps are counted in two ways. In `Plan.at` and `Plan.batch`, `step` is the 0-based number of an update. Where a
docstring says "after `step` updates" (`logs_at`, `epochs_done` and others), it is the number of updates that are done.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dtrain import keyed, schedules
from dtrain.errors import UsageError
from dtrain.settings.optimization import Optimization
from dtrain.settings.staged import Staged
from dtrain.settings.values import Every

EACH_EPOCH = Every(epochs=1)


@dataclass(frozen=True)
class Share:
    """The part of a global batch that one process computes: `size` images, beginning at position `first` of the batch.

    micro_batches: the sizes of the consecutive parts whose gradients are computed one by one and summed.
    mean_over: what the process divides the sum of its images' losses by, before gradients are averaged over processes.
    With (batch size) / (number of processes), that average is the gradient of the mean loss over the global batch, even
    where shares differ in size.
    """

    first: int
    micro_batches: tuple[int, ...]
    mean_over: float

    @property
    def size(self) -> int:
        """The number of images in the share."""
        return sum(self.micro_batches)

    @property
    def positions(self) -> slice:
        """The positions of the share's images in the global batch."""
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True)
class Stage:
    """A part of a run with one batch size and one image size. It lasts whole epochs, unless the run ends in it.

    first_epoch, first_step, first_sample: the numbers of epochs, updates and images that come before the stage.
    shares: one for each process, by rank.
    """

    first_epoch: int
    first_step: int
    first_sample: int
    batch_size: int
    image_size: int
    steps_per_epoch: int
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Now:
    """The plan's values for one step, as far as they may change during a run.

    epoch: counted from 0. batch_size: images of all processes together. image_size: side in pixels of the square images
    that the network receives. first: position in the epoch's sample order at which the batch begins. samples: images
    that the run has seen before this step. shares: one for each process, by rank. lr_factor: the factor by which the
    peak learning rate of every parameter group is multiplied.
    """

    step: int
    epoch: int
    batch_size: int
    image_size: int
    first: int
    samples: int
    shares: tuple[Share, ...]
    lr_factor: float


@dataclass(frozen=True)
class Plan:
    """The derived numbers of one run. Sizes are in images; a batch size counts all processes together.

    stages: those that the run reaches, in order. unreached: (first epoch, batch size, image size) of each other stage.
    unit: how many consecutive images a share must keep together: 2 where images are mixed in pairs, else 1.
    """

    seed: int
    train_size: int
    world_size: int
    grad_accum_steps: int
    unit: int
    stages: tuple[Stage, ...]
    unreached: tuple[tuple[int, int, int], ...]
    total_steps: int
    warmup_samples: int
    schedule: str
    course: schedules.Schedule = field(compare=False)  # the function of the schedule named `schedule`, options bound
    log_interval: int
    eval_every: Every
    save_every: Every

    # -- one step ------------------------------------------------------------------------------------------------------

    def at(self, step: int) -> Now:
        """The values for the 0-based step `step`. Depends on the step alone; takes some microseconds."""
        stage = _stage_at(self.stages, step)
        epochs, turn = divmod(step - stage.first_step, stage.steps_per_epoch)
        samples = _samples_before(self.stages, step)
        return Now(
            step=step,
            epoch=stage.first_epoch + epochs,
            batch_size=stage.batch_size,
            image_size=stage.image_size,
            first=turn * stage.batch_size,
            samples=samples,
            shares=stage.shares,
            lr_factor=schedules.factor(
                self.course, samples, self.total_samples, warmup=self.warmup_samples, batch=stage.batch_size
            ),
        )

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """The indices, in the training set, of the global batch of step `step`: int64 [batch size].

        The first call for an epoch computes the epoch's sample order, O(n log n); later calls for it take a slice.
        """
        now = self.at(step)
        return _order(self.train_size, self.seed, now.epoch)[now.first : now.first + now.batch_size]

    # -- the whole run -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def total_samples(self) -> int:
        """Images that the whole run sees, over all its stages."""
        return _samples_before(self.stages, self.total_steps)

    def epochs_done(self, step: int) -> float:
        """Epochs done after `step` updates, such as 2.5. The images left out at an epoch's end count as seen."""
        return _epochs_done(self.stages, step)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sides in pixels of the images that the network sees during the run, each once, in ascending order."""
        return tuple(sorted({stage.image_size for stage in self.stages}))

    @property
    def evaluation_size(self) -> int:
        """The side in pixels at which the network is evaluated: that of the last stage."""
        return self.stages[-1].image_size

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every (images, side in pixels) of a micro-batch in the run, on any process; each once, in ascending order."""
        every = {
            (size, stage.image_size) for stage in self.stages for share in stage.shares for size in share.micro_batches
        }
        return tuple(sorted(every))

    @property
    def largest_share(self) -> int:
        """The most images that one process computes in one step."""
        return max(share.size for stage in self.stages for share in stage.shares)

    @property
    def largest_micro_batch(self) -> int:
        """The most images in one forward pass of training, over all processes and stages."""
        return max(size for size, _ in self.shapes)

    # -- what is due ---------------------------------------------------------------------------------------------------

    def logs_at(self, step: int) -> bool:
        """Whether a row of metrics is due after `step` updates: every `log_interval` updates, and at the end."""
        return step % self.log_interval == 0 or step == self.total_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after `step` updates; always at the end."""
        return self._due(self.eval_every, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` updates, apart from those due by time; always at the end."""
        return self._due(self.save_every, step)

    def _due(self, every: Every, step: int) -> bool:
        if step == self.total_steps:
            return True
        if every.steps is not None:
            return step % every.steps == 0
        if every.epochs is not None and step > 0:  # due after the first step at or past each multiple of the interval
            before, after = (self.epochs_done(done) / every.epochs for done in (step - 1, step))
            return math.floor(after + 1e-9) > math.floor(before + 1e-9)
        return False

    # -- for people ----------------------------------------------------------------------------------------------------

    def lighter(self) -> str:
        """Advice for a run that needs too much memory: flags that about halve the images of a forward pass."""
        batches = [stage.batch_size // 2 // self.unit * self.unit for stage in self.stages]
        tries, smallest = [], min(min(share.size for share in stage.shares) for stage in self.stages)
        if all(_smallest_share(batch, self.world_size, self.unit) >= self.grad_accum_steps for batch in batches):
            halved = Staged.parse(",".join([str(batches[0]), *map(_change, self.stages[1:], batches[1:])]))
            tries.append(f"--batch-size {halved}")
        if (finer := min(2 * self.grad_accum_steps, smallest)) > self.grad_accum_steps:
            tries.append(f"--grad-accum-steps {finer}, which keeps the batch")
        return f"try {', or '.join(tries)}" if tries else "one image at a time is too much: use a smaller network"

    def lines(self, rate: str) -> list[str]:
        """The plan as lines of text, with the reason for each number. rate: the peak learning rate, as text."""
        lines = []
        for stage in self.stages:
            if len(self.stages) > 1:
                size = f"images of {stage.image_size} x {stage.image_size} pixels"
                begins = (
                    f"epoch {stage.first_epoch}, after {stage.first_step} steps" if stage.first_step else "the start"
                )
                lines.append(f"from {begins}: {size}")
            left = self.train_size - stage.steps_per_epoch * stage.batch_size
            tail = f"; {left} images of each epoch's order are left out" if left else ""
            lines.append(f"batch {stage.batch_size} = {self._shares_told(stage)}")
            lines.append(f"{stage.steps_per_epoch} steps an epoch = {self.train_size} // {stage.batch_size}{tail}")
        epochs = self.epochs_done(self.total_steps)
        lines += [
            f"epoch {epoch}, with batch {batch} and images of {size} x {size} pixels, comes after the end of this run"
            for epoch, batch, size in self.unreached
        ]
        warm = f" after a warm-up of {self.warmup_samples} images" if self.warmup_samples else ""
        lines.append(f"{self.total_steps} steps in all = {epochs:.4g} epochs")
        lines.append(f"peak rate {rate}, {self.schedule}{warm}")
        return lines

    def _shares_told(self, stage: Stage) -> str:
        sizes = _either(share.size for share in stage.shares)
        text = f"{self.world_size} processes x {sizes}" if self.world_size > 1 else "1 process"
        if self.grad_accum_steps > 1:
            parts = _either(size for share in stage.shares for size in share.micro_batches)
            text += f", each in {self.grad_accum_steps} micro-batches of {parts}"
        return text


def _either(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(sizes))))


def _change(stage: Stage, value: int) -> str:
    return f"{value}@{stage.first_epoch}"


# two epochs, because near the end of one the loader already prepares the first batches of the next
@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return keyed.order(n, seed, epoch)


# -- making one --------------------------------------------------------------------------------------------------------


def cuts(images: int, parts: int, unit: int = 1) -> tuple[int, ...]:
    """The bounds of `parts` consecutive parts of `images`, which differ by at most `unit` if it divides `images`.

    Returns parts + 1 positions, from 0 to `images`. Position r is (r * (images // unit) // parts) * unit, so the size
    of every part but the last is a multiple of `unit`.
    """
    units = images // unit
    return (*(r * units // parts * unit for r in range(parts)), images)


def shares_of(batch_size: int, *, world_size: int, grad_accum_steps: int, unit: int) -> tuple[Share, ...]:
    """The share of each process, by rank. With `unit` 2, no pair is split over two shares; micro-batches may split one.

    The shares of a batch differ by at most `unit` images.
    """
    bounds = cuts(batch_size, world_size, unit)
    sizes = _lengths(bounds)
    micro_batches = {size: _lengths(cuts(size, grad_accum_steps)) for size in set(sizes)}
    mean_over = batch_size / world_size
    return tuple(Share(first, micro_batches[size], mean_over) for first, size in zip(bounds, sizes, strict=False))


def _lengths(bounds: Sequence[int]) -> tuple[int, ...]:
    return tuple(end - first for first, end in zip(bounds, bounds[1:], strict=False))


def _smallest_share(batch_size: int, world_size: int, unit: int) -> int:
    return batch_size // unit // world_size * unit


def check_batch(asked: Optimization, *, mixing: Sequence[str], world_size: int) -> None:
    """Raise UsageError if a batch size of the run cannot be shared by `world_size` processes, and say which can.

    mixing: the flags given that mix images in pairs, such as ("--mixup",). With any of them, a batch must be even and
    every process needs at least one pair. Needs no data set, so it runs before one is converted.
    """
    unit, by = 2 if mixing else 1, " and ".join(mixing)
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    for batch in asked.batch_size.values:
        if batch % unit:
            sizes = f"{batch - 1} or {batch + 1}" if batch > 1 else str(batch + 1)
            raise UsageError(f"--batch-size {batch} does not divide into the pairs of {by}; try {sizes}")
        least = world_size * unit
        if batch < least:
            each = f"a pair of images for {by}" if mixing else "an image"
            raise UsageError(
                f"--batch-size {batch} is too small for {processes}, each of which needs {each}; "
                f"give at least {least}, or start at most {batch // unit}"
            )
        smallest = _smallest_share(batch, world_size, unit)
        if asked.grad_accum_steps > smallest:
            raise UsageError(
                f"--grad-accum-steps {asked.grad_accum_steps}: of --batch-size {batch} over {processes}, one gets only "
                f"{smallest} images, too few for so many micro-batches; give at most {smallest}, or a larger batch"
            )


def _check_fits(batch: int, train_size: int, world_size: int, unit: int) -> None:
    if batch > train_size:
        most = train_size // unit * unit
        fix = f"give at most {most}" if most >= world_size * unit else "use fewer processes"
        raise UsageError(f"--batch-size {batch} is larger than the training set of {train_size} images; {fix}")


def make_plan(
    asked: Optimization,
    *,
    seed: int,
    train_size: int,
    image_size: Staged,
    world_size: int,
    mixing: Sequence[str] = (),
    warmup_yields: bool = False,
    log_interval: int = 50,
    eval_every: Every = EACH_EPOCH,
    save_every: Every = EACH_EPOCH,
) -> Plan:
    """The plan of a run on a training set of `train_size` images with `world_size` processes.

    mixing: the flags given that mix images in pairs, as for `check_batch`. warmup_yields: if true, a warm-up that
    leaves no step for the schedule is shortened to half of the run, as for a recipe written for a longer run; if false,
    it is an error.
    Raises UsageError if a batch cannot be shared (`check_batch`) or is larger than the training set, if the warm-up
    leaves no step, or for a wrong option of the schedule; PluginError if the schedule cannot be used.
    """
    check_batch(asked, mixing=mixing, world_size=world_size)
    batch_size, epochs, steps = asked.batch_size, asked.epochs, asked.steps
    unit = 2 if mixing else 1
    begins = sorted({epoch for staged in (batch_size, image_size) for epoch, _ in staged.changes})
    stages: list[Stage] = []
    for epoch in begins:
        first_step, batch = _steps_until(stages, epoch), batch_size.at(epoch)
        if first_step >= steps if steps is not None else epoch >= epochs:
            break  # the run ends before this stage, so its batch need not fit the training set
        _check_fits(batch, train_size, world_size, unit)
        shares = shares_of(batch, world_size=world_size, grad_accum_steps=asked.grad_accum_steps, unit=unit)
        first_sample, per_epoch = _samples_before(stages, first_step), train_size // batch
        stages.append(Stage(epoch, first_step, first_sample, batch, image_size.at(epoch), per_epoch, shares))
    total = steps if steps is not None else max(1, _steps_until(stages, epochs))
    stages = [stage for stage in stages if stage.first_step < total]  # the last may have no step, by rounding
    warmup = _steps_until(stages, asked.warmup_epochs)
    if warmup >= total and warmup_yields:
        warmup = total // 2
    if warmup and warmup >= total:
        raise UsageError(
            f"--warmup-epochs {asked.warmup_epochs:g} is {warmup} of {total} steps and leaves none for the schedule; "
            f"give less than {_epochs_done(stages, total):g}"
        )
    scheduled = _samples_before(stages, total) - _samples_before(stages, warmup)
    course = schedules.chosen_schedule(asked.schedule, asked.schedule_opt, total=scheduled)
    return Plan(
        seed=seed,
        train_size=train_size,
        world_size=world_size,
        grad_accum_steps=asked.grad_accum_steps,
        unit=unit,
        stages=tuple(stages),
        unreached=tuple((epoch, batch_size.at(epoch), image_size.at(epoch)) for epoch in begins[len(stages) :]),
        total_steps=total,
        warmup_samples=_samples_before(stages, warmup),
        schedule=asked.schedule,
        course=course,
        log_interval=log_interval,
        eval_every=eval_every,
        save_every=save_every,
    )


# -- walking through stages --------------------------------------------------------------------------------------------


def _stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the 0-based step `step`; the last stage for a step past the end of the run."""
    return stages[bisect.bisect_right(stages, step, key=lambda stage: stage.first_step) - 1]


def _samples_before(stages: Sequence[Stage], step: int) -> int:
    """Images seen after `step` updates."""
    if not stages:
        return 0
    stage = _stage_at(stages, step)
    return stage.first_sample + (step - stage.first_step) * stage.batch_size


def _epochs_done(stages: Sequence[Stage], step: int) -> float:
    stage = _stage_at(stages, step)
    return stage.first_epoch + (step - stage.first_step) / stage.steps_per_epoch


def _steps_until(stages: Sequence[Stage], epochs: float) -> int:
    """The number of updates that `epochs` epochs take; a fraction of an epoch is rounded to whole steps."""
    if not stages:
        return 0
    stage = stages[bisect.bisect_right(stages, epochs, key=lambda stage: stage.first_epoch) - 1]
    return stage.first_step + round((epochs - stage.first_epoch) * stage.steps_per_epoch)
