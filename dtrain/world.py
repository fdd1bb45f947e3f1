"""What the processes of a run say to each other: what they agree on, what they sum, what rank 0 tells the others.

There are three kinds of talk, all over torch.distributed:
- gradients, by DDP, on the default group (gloo or nccl);
- agreement, by one asynchronous int64 all-reduce a step on a gloo group of its own, posted in one step and read in the
  next;
- what rank 0 does alone (files), by `from_main`: its result or its error becomes everybody's.
How processes meet and part stands in rendezvous.py. A collective that fails is explained through the store
(witness.py), where each process keeps how far it came.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dtrain import rendezvous
from dtrain.errors import DtrainError, ProcessError
from dtrain.witness import Witness

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Place:
    """Which process of the run this is, as torchrun and other launchers tell it through the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.rank == 0


def place(env: Mapping[str, str] = os.environ) -> Place:
    """The place that RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE tell; rank 0 of 1 where they are not set."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Place()
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    return Place(rank, size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size)))


@dataclass(frozen=True)
class Ask:
    """What all processes have agreed to do at this step boundary."""

    save: bool = False
    stop: bool = False


class Clock(Protocol):
    """What rank 0 asks for because of the time: a save that is due, or a stop at a limit that is reached."""

    def ask(self) -> Ask:
        """What is due at this moment."""
        ...


@contextlib.contextmanager
def signals_as_before() -> Iterator[None]:
    """Restore the handlers of the signals that stop a run at the end of the `with`, whatever was set inside."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class World:
    """This process among the others of its run. With one process nothing is sent and no group exists.

    A method that is called collective must be called by every process of the run, in the same order.
    """

    def __init__(self, at: Place, timeout_seconds: float) -> None:
        self._at = at
        self.rank, self.size, self.is_main = at.rank, at.size, at.is_main
        self.timeout_seconds = timeout_seconds
        self.stop_reason: str | None = None  # the signal this process was sent
        self._meeting: rendezvous.Meeting | None = None
        self._witness: Witness | None = None
        self._control: Any = None  # the gloo group for agreement
        self._posted: Any = None
        self._pending = Ask()

    @classmethod
    def alone(cls) -> World:
        """The world of a single process, which waits for nobody."""
        return cls(Place(), 1.0)

    # -- coming and going ------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Meet the other processes; from now on an error of one is known to all. Collective.

        Raises ProcessError if they do not come within the time-out, and the error of one that has failed meanwhile.
        """
        if self.size > 1:
            first = self.rank - self._at.local_rank
            neighbours = range(first, min(first + self._at.local_size, self.size))
            self._meeting = rendezvous.meet(self.rank, self.size, neighbours, self.timeout_seconds)
            self._witness = self._meeting.witness
            self.wait_for_all("met", self.timeout_seconds)  # afterwards one that fails has somebody to tell

    def wait_for_all(self, point: str, seconds: float) -> None:
        """Wait in the store until all have come to `point`, for work that may take longer than a collective may.

        Raises the error of one that has failed, and ProcessError after `seconds` or for one that shows no life.
        """
        if self._witness is not None:
            self._witness.all_at(point, seconds)

    def first_of_host(self, work: Callable[[str], T], told: Callable[[T], str], point: str, seconds: float) -> T:
        """`work("")` on the first process of each host; then, with what `told` says of its result, on the others there.

        For what one process a host reads and the others need not read again. Collective; waits like `wait_for_all`.
        """
        if self._witness is None:
            return work("")
        if self._at.local_rank:
            self.wait_for_all(point, seconds)
            return work(self._witness.handed_over(f"found {point}"))
        result = work("")
        self._witness.hand_over(f"found {point}", told(result))
        self.wait_for_all(point, seconds)
        return result

    def join(self, backend: str) -> None:
        """Make the groups for gradients and for agreement, once all have met and none has failed. Collective.

        Raises the error of one that has.
        """
        if self._meeting is not None:
            self.wait_for_all("ready", self.timeout_seconds)
            self._control = self._meeting.join(backend)

    def leave(self) -> None:
        """Part from the others in good order. Collective: call it on every rank, or on none after an error."""
        if self._control is None or self._meeting is None:
            return
        import torch.distributed as dist

        self._read_posted()
        dist.barrier(group=self._control)
        self._meeting.part()
        self._control = None

    # -- agreement -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGTERM, SIGINT and SIGUSR1 into a request to stop, which `agreed` carries to all processes.

        A handler only sets a flag, because Python runs no handler while a collective blocks, and a handler must not
        start one. Outside the main thread, as under Ray, signals are left alone.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stop_reason = signal.Signals(number).name

    def ignore_signals(self) -> None:
        """Ignore further signals once all have agreed to stop: a late TERM would turn exit code 75 into 143."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def post(self, clock: Clock) -> None:
        """Send what this process asks for; the next `agreed` reads it. An asynchronous all-reduce of two int64."""
        mine = clock.ask() if self.is_main else Ask()
        mine = Ask(save=mine.save, stop=mine.stop or self.stop_reason is not None)
        if self._control is None:
            self._pending = mine
            return
        import torch
        import torch.distributed as dist

        wishes = torch.tensor([mine.save, mine.stop], dtype=torch.int64)
        work = dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._posted = (work, wishes)

    def agreed(self, clock: Clock, step: int | None = None) -> Ask:
        """Return what all processes posted one step ago, and post anew. Collective; waits only for what is a step old.

        step: how many updates are done, which the heartbeat tells the others; None leaves it, as in an evaluation.
        """
        if self._witness is not None and step is not None:
            self._witness.beat.step = str(step)
        ask = self._read_posted()
        if not ask.stop:
            self.post(clock)
        else:
            self.ignore_signals()
        return ask

    def _read_posted(self) -> Ask:
        if self._control is None:
            pending, self._pending = self._pending, Ask()
            return pending
        if self._posted is None:
            return Ask()
        (work, wishes), self._posted = self._posted, None
        work.wait()
        save, stop = wishes.tolist()
        return Ask(save=bool(save), stop=bool(stop))

    # -- sums, files, sameness -------------------------------------------------------------------------------------

    def total(self, sums: torch.Tensor) -> list[int]:
        """The sum of an int64 tensor over all processes, as ints. Collective and a host sync: use it at log points."""
        mine = sums.cpu()
        if self._control is not None:
            import torch.distributed as dist

            dist.all_reduce(mine, group=self._control)
        return [int(value) for value in mine.tolist()]

    def least(self, value: int) -> int:
        """The smallest of all processes' values. Collective."""
        if self._control is None:
            return value
        import torch
        import torch.distributed as dist

        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._control)
        return int(box.item())

    def from_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; every rank returns its result or raises its DtrainError. Collective.

        The result is pickled and sent over the network, so it should be small.
        """
        if self._control is None:
            return work()
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box = [work(), None]
            except DtrainError as error:
                box = [None, error]
        dist.broadcast_object_list(box, src=0, group=self._control)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def main_first(self, work: Callable[[bool], T]) -> T:
        """Run `work(True)` on rank 0, then `work(False)` on the others. Collective.

        If rank 0 raises a DtrainError, every rank raises it and the others do not begin.
        """
        mine: list[T] = []
        self.from_main(lambda: mine.append(work(True)))
        return mine[0] if mine else work(False)

    def same(self, value: str, what: str) -> None:
        """Raise ProcessError on every rank unless all gave the same `value`. Collective; one broadcast, one all-reduce.

        what: names the value in the error.
        """
        if self._control is None:
            return
        import torch
        import torch.distributed as dist

        mains = self.from_main(lambda: value)
        differing = torch.tensor([0 if value == mains else self.rank], dtype=torch.int64)
        dist.all_reduce(differing, op=dist.ReduceOp.MAX, group=self._control)
        if rank := int(differing.item()):
            raise ProcessError(f"{what} of process {rank} differs from that of process 0; give all processes the same")

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite `tensors` with rank 0's, in place. Collective on the default group."""
        if self._control is None:
            return
        import torch.distributed as dist

        for work in [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors]:
            if work is not None:
                work.wait()

    # -- when something goes wrong ---------------------------------------------------------------------------------

    def explained(self, error: Exception) -> Exception:
        """The error to end this process with, so that one process of the run prints it and all end with its exit code.

        A process that fails on its own leaves its error in the store. One whose collective failed takes that error
        over; if there is none, it waits two heartbeats to see which processes still live, and names those that do not.
        """
        if self._witness is None:  # before they meet all processes find the same error, unless they do not meet
            return _told(error, elsewhere=not self.is_main and not isinstance(error, ProcessError))
        if _is_of_a_collective(error):
            other = self._witness.told_by_another() or self._witness.silent()
            other.__cause__ = error
            error = other
        first = self._witness.tell(error)
        self._witness.let_others_hear()
        return _told(error, elsewhere=not first)


def _told(error: Exception, *, elsewhere: bool) -> Exception:
    """The error, knowing whether another process prints it; an unexpected one that another prints is one line here."""
    if isinstance(error, DtrainError):
        return error.told(elsewhere=elsewhere)
    if not elsewhere:
        return error
    line = DtrainError(f"{type(error).__name__}: {error}", told_elsewhere=True)
    line.__cause__ = error
    return line


def _is_of_a_collective(error: Exception) -> bool:
    """Whether an error comes from torch.distributed: a DistError, or a RuntimeError that names the back end."""
    text = str(error).lower()
    known = type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    return isinstance(error, RuntimeError) and known
