"""The communication between the processes of a run: agreement about stops and saves, sums, and work for rank 0 alone.

The processes communicate in three ways, all over torch.distributed:
- DDP averages gradients on the default group (gloo or nccl);
- to agree on a stop or a save, they run one asynchronous int64 all-reduce a step on a separate gloo group, started in
  one step and read in the next;
- `from_main` runs work such as writing files on rank 0 alone, and gives its result or its error to all ranks.
rendezvous.py connects the processes. When a collective fails, witness.py finds the cause through the store, where each
process records its progress.
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
    """Which process of the run this is, from the environment variables that torchrun and other launchers set."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files for the run: true for rank 0."""
        return self.rank == 0


def place(env: Mapping[str, str] = os.environ) -> Place:
    """The place given by RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; rank 0 of 1 if they are not set.

    Without the two LOCAL variables, all processes are taken to be on one host.
    """
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Place()
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    return Place(rank, size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size)))


@dataclass(frozen=True)
class Ask:
    """What all processes agree to do between two steps: save a checkpoint, stop, or neither."""

    save: bool = False
    stop: bool = False


class Clock(Protocol):
    """What rank 0 asks for because of the time: a save that is due, or a stop at a time limit."""

    def ask(self) -> Ask:
        """What is due now."""
        ...


@contextlib.contextmanager
def signals_as_before() -> Iterator[None]:
    """Restore the handlers of SIGTERM, SIGINT and SIGUSR1 at the end of the `with` block.

    Does nothing outside the main thread, where Python cannot set handlers.
    """
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
    """This process's connection to the others of its run. With one process, nothing is sent and no group exists.

    A method whose docstring says "Collective" must be called by every process of the run, in the same order.
    """

    def __init__(self, at: Place, timeout_seconds: float) -> None:
        self._at = at
        self.rank, self.size, self.is_main = at.rank, at.size, at.is_main
        self.timeout_seconds = timeout_seconds
        self.stop_reason: str | None = None  # the name of the signal that asked this process to stop
        self._meeting: rendezvous.Meeting | None = None
        self._witness: Witness | None = None
        self._control: Any = None  # the gloo group for everything but gradients and buffers
        self._posted: Any = None
        self._pending = Ask()

    @classmethod
    def alone(cls) -> World:
        """The world of a single process."""
        return cls(Place(), 1.0)

    # -- coming and going ------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Connect to the other processes; from then on all hear of an error of one. Collective.

        Raises ProcessError if some do not connect within the time-out, or the error of one that fails meanwhile.
        """
        if self.size > 1:
            first = self.rank - self._at.local_rank
            neighbours = range(first, min(first + self._at.local_size, self.size))
            self._meeting = rendezvous.meet(self.rank, self.size, neighbours, self.timeout_seconds)
            self._witness = self._meeting.witness
            self.wait_for_all("met", self.timeout_seconds)  # a process that fails later can tell all the others

    def wait_for_all(self, point: str, seconds: float) -> None:
        """A barrier called `point`, for work that may take longer than the time-out of a collective. Collective.

        Raises the error of a process that has failed; ProcessError after `seconds`, or if one has died or hangs.
        """
        if self._witness is not None:
            self._witness.all_at(point, seconds)

    def first_of_host(self, work: Callable[[str], T], told: Callable[[T], str], point: str, seconds: float) -> T:
        """Call `work("")` on the first process of each host, then `work(told(result))` on the other processes there.

        For expensive work that one process of a host does and the others need not repeat: `told` turns its result into
        a text from which they get the same result cheaply. Returns each process's own result. Collective; waits and
        raises like `wait_for_all`.
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
        """Create the process groups, once all processes are ready. Collective.

        Raises the error of a process that has failed before.
        """
        if self._meeting is not None:
            self.wait_for_all("ready", self.timeout_seconds)
            self._control = self._meeting.join(backend)

    def leave(self) -> None:
        """Disconnect after a run without an error. Collective; must not be called after an error."""
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
        """Inside the `with` block, take SIGTERM, SIGINT and SIGUSR1 as requests to stop, which `agreed` tells to all.

        The handler only sets a flag: it must not start a collective, and Python calls it only after one that blocks
        has returned. Outside the main thread, as under Ray, no handler can be set, and signals keep their effect.
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
        """Ignore further signals once all have agreed to stop: a late SIGTERM would turn exit code 75 into 143."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def post(self, clock: Clock) -> None:
        """Start an asynchronous all-reduce of what this process asks for; the next `agreed` reads the result.

        Collective. It sends two int64.
        """
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
        """Return what the processes together asked for one step ago, and post what this one asks for now. Collective.

        It waits only for the all-reduce that was started one step ago, which has usually finished. step: the number of
        updates done, which the heartbeat then reports; None leaves the reported step as it is, as in an evaluation.
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
        """The sum of an int64 tensor over all processes, as ints. Collective; a host sync, so only for log points."""
        mine = sums.cpu()
        if self._control is not None:
            import torch.distributed as dist

            dist.all_reduce(mine, group=self._control)
        return [int(value) for value in mine.tolist()]

    def least(self, value: int) -> int:
        """The smallest value over all processes. Collective."""
        if self._control is None:
            return value
        import torch
        import torch.distributed as dist

        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._control)
        return int(box.item())

    def from_main(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 alone; every rank returns its result or raises its DtrainError. Collective.

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
        """Call `work(True)` on rank 0, then `work(False)` on the others; returns each rank's own result. Collective.

        If rank 0 raises a DtrainError, every rank raises it and the others do not call `work`.
        """
        mine: list[T] = []
        self.from_main(lambda: mine.append(work(True)))
        return mine[0] if mine else work(False)

    def same(self, value: str, what: str) -> None:
        """Raise ProcessError on every rank unless all pass the same `value`. Collective: a broadcast and an all-reduce.

        what: the name of the value, for the error.
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
        """The error to end this process with. One process of the run prints it, and all end with its exit code.

        A process that fails by itself puts its error into the store. A process whose collective has failed raises the
        error that it finds in the store. If there is none within two heartbeats, it finds out which processes have
        stopped answering, and the error names these.
        """
        if self._witness is None:  # before they connect, all find the same error, except for a failure to connect
            return _told(error, elsewhere=not self.is_main and not isinstance(error, ProcessError))
        if _is_of_a_collective(error):
            other = self._witness.told_by_another() or self._witness.silent()
            other.__cause__ = error
            error = other
        first = self._witness.tell(error)
        self._witness.let_others_hear()
        return _told(error, elsewhere=not first)


def _told(error: Exception, *, elsewhere: bool) -> Exception:
    """A DtrainError that knows whether another process prints it; an unexpected error that is printed here, unchanged.

    An unexpected error that another process prints becomes a DtrainError, so that this process prints no traceback.
    """
    if isinstance(error, DtrainError):
        return error.told(elsewhere=elsewhere)
    if not elsewhere:
        return error
    line = DtrainError(f"{type(error).__name__}: {error}", told_elsewhere=True)
    line.__cause__ = error
    return line


def _is_of_a_collective(error: Exception) -> bool:
    """Whether an error comes from torch.distributed: a DistError, or a RuntimeError whose text names gloo or NCCL."""
    text = str(error).lower()
    known = type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    return isinstance(error, RuntimeError) and known
