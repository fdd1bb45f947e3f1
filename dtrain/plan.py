"""Every number of a run that follows from others, once, and why: pure, without torch, data or processes.

A Plan answers for any step, without history: which samples it is made of, which part of them is whose, its learning
rate, and whether something is due after it. "After step k" counts updates done: step 0 is before the first.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain import keyed, schedules
from dtrain.config import TrainConfig
from dtrain.errors import UsageError
from dtrain.ranges import Every, flag_of, parse_every


@dataclass(frozen=True)
class Plan:
    """The derived numbers of one run. Sizes are in images; `batch_size` counts all processes together.

    batch_size = world_size x share, share = grad_accum_steps x micro_batch, steps_per_epoch = train_size // batch_size.
    """

    seed: int
    train_size: int
    world_size: int
    batch_size: int
    batch_unit: int
    share: int
    micro_batch: int
    steps_per_epoch: int
    total_steps: int
    warmup_samples: int
    schedule: str
    course: schedules.Schedule
    log_interval: int
    eval_every: Every
    save_every: Every

    @property
    def total_samples(self) -> int:
        """Images that the whole run sees."""
        return self.total_steps * self.batch_size

    def batch_size_at(self, step: int) -> int:
        """The size of the global batch that step `step` (0-based) is made of."""
        return self.batch_size

    def epoch_at(self, step: int) -> int:
        """The epoch (0-based) that step `step` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Positions in the training set of the whole global batch of step `step`, int64 [batch_size]."""
        first = step % self.steps_per_epoch * self.batch_size
        return _order(self.train_size, self.seed, self.epoch_at(step))[first : first + self.batch_size]

    def share_of(self, step: int, rank: int) -> npt.NDArray[np.int64]:
        """The part of `batch(step)` that process `rank` computes: the rank-th contiguous one, int64 [share]."""
        return self.batch(step)[rank * self.share : (rank + 1) * self.share]

    def lr_factor(self, samples: int) -> float:
        """What every group's own learning rate is multiplied by in the step that begins with `samples` seen."""
        return schedules.factor(
            self.course, samples, self.total_samples, warmup=self.warmup_samples, batch=self.batch_size
        )

    def logs_at(self, step: int) -> bool:
        """Whether a row is due after `step` updates: every `log_interval`, and at the end."""
        return step % self.log_interval == 0 or step == self.total_steps

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due after `step` updates; always at the end."""
        return self._due(self.eval_every, step)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` updates, as far as steps decide; always at the end."""
        return self._due(self.save_every, step)

    def _due(self, every: Every, step: int) -> bool:
        if step == self.total_steps:
            return True
        if every.steps is not None:
            return step % every.steps == 0
        if every.epochs is not None:  # the first step at or past each multiple of the interval
            per_interval = every.epochs * self.steps_per_epoch
            return step > 0 and math.floor(step / per_interval + 1e-9) > math.floor((step - 1) / per_interval + 1e-9)
        return False

    def lighter(self) -> str:
        """What to try where a step needs too much memory: about half as many images at a time."""
        accumulation, tries = self.share // self.micro_batch, []
        if batch := self.batch_size // 2 // self.batch_unit * self.batch_unit:
            tries.append(f"--batch-size {batch}")
        finer = (k for k in range(2 * accumulation, self.share + 1) if self.share % k == 0)
        if (steps := next(finer, None)) is not None:
            tries.append(f"--grad-accum-steps {steps}, which keeps the batch")
        return f"try {', or '.join(tries)}" if tries else "one image at a time is too much: use a smaller network"

    def lines(self, lr: float) -> list[str]:
        """The plan for people, each number with its reason. lr: the peak learning rate."""
        share = f"{self.world_size} processes x {self.share}" if self.world_size > 1 else "1 process"
        if self.share != self.micro_batch:
            share += f", each in {self.share // self.micro_batch} micro-batches of {self.micro_batch}"
        left = self.train_size - self.steps_per_epoch * self.batch_size
        tail = f"; {left} images of each epoch's order are left out" if left else ""
        warm = f" after a warm-up of {self.warmup_samples} images" if self.warmup_samples else ""
        return [
            f"batch {self.batch_size} = {share}",
            f"{self.steps_per_epoch} steps an epoch = {self.train_size} // {self.batch_size}{tail}",
            f"{self.total_steps} steps in all = {self.total_steps / self.steps_per_epoch:.4g} epochs",
            f"peak rate {lr:g}, {self.schedule}{warm}",
        ]


# the epoch being read and, near its end, the one prefetched; of a pure function, so no state
@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return keyed.order(n, seed, epoch)


def check_batch(config: TrainConfig, world_size: int) -> int:
    """What the batch must be a multiple of. Raises UsageError where it is not, naming the nearest sizes that are.

    It divides over processes and micro-batches, and a share into the pairs that mixing needs.
    """
    batch, unit = config.batch_size, world_size * config.grad_accum_steps
    mixing = [flag_of(name) for name in ("mixup", "cutmix") if getattr(config, name) > 0]
    if mixing:
        unit = math.lcm(unit, 2 * world_size)
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        sizes = f"{below} or {above}" if below else str(above)
        accumulated = f" x {config.grad_accum_steps} micro-batches" if config.grad_accum_steps > 1 else ""
        pairs = f" into the pairs of {' and '.join(mixing)}" if mixing else ""
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise UsageError(f"--batch-size {batch} does not divide over {processes}{accumulated}{pairs}; try {sizes}")
    return unit


def make_plan(config: TrainConfig, *, train_size: int, world_size: int) -> Plan:
    """The plan of `config` for a training set of `train_size` images on `world_size` processes.

    Raises UsageError where a batch does not divide (`check_batch`), is larger than the training set, or a warm-up
    leaves no step for the schedule.
    """
    batch, unit = config.batch_size, check_batch(config, world_size)
    if batch > train_size:
        most = train_size // unit * unit
        fix = f"give at most {most}" if most else "use fewer processes"
        raise UsageError(f"--batch-size {batch} is larger than the training set of {train_size} images; {fix}")
    per_epoch = train_size // batch
    total = config.steps if config.steps is not None else max(1, round(config.epochs * per_epoch))
    warmup = round(config.warmup_epochs * per_epoch)
    if warmup >= total and config.origin("warmup_epochs") not in ("flag", "default"):
        warmup = total // 2  # a recipe's, meant for its own length; what fits means the same from every layer
    if warmup and warmup >= total:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs:g} is {warmup} of {total} steps and leaves none for the schedule; "
            f"give less than {total / per_epoch:g}"
        )
    course = schedules.chosen_schedule(config.schedule, config.schedule_opt, total=(total - warmup) * batch)
    return Plan(
        seed=config.seed,
        train_size=train_size,
        world_size=world_size,
        batch_size=batch,
        batch_unit=unit,
        share=batch // world_size,
        micro_batch=batch // world_size // config.grad_accum_steps,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_samples=warmup * batch,
        schedule=config.schedule,
        course=course,
        log_interval=config.log_interval,
        eval_every=parse_every(config.eval_every, "--eval-every", clock=False),
        save_every=parse_every(config.checkpoint_every, "--checkpoint-every", clock=True),
    )
