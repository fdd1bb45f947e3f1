"""The only file that knows processes: who we are, what is agreed, what is summed, who fell silent.

Three kinds of talk, all over torch.distributed:
- gradients, by DDP, on the default group (gloo or nccl);
- agreement, one asynchronous int64 all-reduce a step on a gloo group of its own: posted in one step, read in the next;
- what only rank 0 does (files), through `from_main`: its result or its error is everybody's.
A collective that fails is explained through the store (witness.py), where each process keeps how far it came.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dtrain.errors import DtrainError, ProcessError
from dtrain.witness import BEAT_SECONDS, Witness

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WATCHDOG_GRACE = timedelta(seconds=60)


@dataclass(frozen=True)
class Place:
    """Which process this is, as torchrun and its kin tell it by the environment; alone without them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.rank == 0


def place(env: Mapping[str, str] = os.environ) -> Place:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process, rank 0, where they are not set."""
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
    """Rank 0's wishes that depend on time: a save that is due, a limit that is reached."""

    def ask(self) -> Ask:
        """What is due now."""
        ...


@contextlib.contextmanager
def signals_as_before() -> Iterator[None]:
    """Give the signals that stop a run back their handlers at the end, whatever was set inside."""
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
    """This process among the others. With one process nothing is sent and no group exists."""

    def __init__(self, at: Place, timeout_seconds: float) -> None:
        self._at = at
        self.rank, self.size, self.is_main = at.rank, at.size, at.is_main
        self.timeout_seconds = timeout_seconds
        self.stop_reason: str | None = None  # the signal this process was sent
        self._control: Any = None
        self._posted: Any = None
        self._pending = Ask()
        self._witness: Witness | None = None
        self._default_store: Any = None

    # -- coming and going ------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Find the store that all share, where from now on an error of one is known to all. Collective."""
        if self.size == 1:
            return
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__
        from torch.distributed.rendezvous import rendezvous

        if self.size > self._at.local_size:
            _choose_interface()
        timeout = timedelta(seconds=self.timeout_seconds)
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")

        def stores() -> tuple[Any, Any]:
            default, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=timeout))
            # a client of its own: the default group's may be busy inside a collective when the beat wants to write
            return default, TCPStore(host, int(port), is_master=False, timeout=timeout)

        try:
            self._default_store, client = _within(self.timeout_seconds + BEAT_SECONDS, stores)
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error):
                raise ProcessError(
                    f"port {port} of this host, where the processes are to meet, is in use; give torchrun another "
                    "--master-port (or set another MASTER_PORT), or --standalone"
                ) from None
            raise ProcessError(
                f"process {self.rank} of {self.size} could not meet the others at {host}:{port} within "
                f"{self.timeout_seconds:g} s: {_first_line(error)}"
            ) from None
        first = self.rank - self._at.local_rank
        neighbours = range(first, min(first + self._at.local_size, self.size))
        store = PrefixStore("dtrain", client)
        self._witness = Witness(store, self.rank, self.size, neighbours, self.timeout_seconds)
        self._witness.all_at("met", self.timeout_seconds)  # who fails now has somebody to tell

    def wait_for_all(self, point: str, seconds: float) -> None:
        """Wait in the store until all have come to `point`, for what may take longer than a collective may.

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
        """Make the default group and the gloo group for agreement, once all have met and none has failed. Collective.

        Raises the error of one that has.
        """
        if self._witness is None:
            return
        import torch.distributed as dist

        timeout = timedelta(seconds=self.timeout_seconds)
        self.wait_for_all("ready", self.timeout_seconds)
        # NCCL's watchdog ends a process that waits too long: later than gloo, whose error tells who fell silent
        patience = timeout + WATCHDOG_GRACE if backend == "nccl" else timeout
        store = self._default_store
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=patience)
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def leave(self) -> None:
        """Part from the others in good order. Collective: call it on every rank, or on none after an error."""
        if self._control is None:
            return
        import torch.distributed as dist

        self._read_posted()
        dist.barrier(group=self._control)
        if self._witness is not None:
            self._witness.beat.stop()
        dist.destroy_process_group()
        self._control = None

    # -- agreement -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGTERM, SIGINT and SIGUSR1 into a wish to stop, which `agreed` carries to all.

        A handler only sets a flag: no Python handler runs inside a blocked collective, and none may start one.
        Outside the main thread (Ray) signals are left alone.
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
        """From the agreement to stop on: a late TERM must not turn exit code 75 into 143."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def post(self, clock: Clock) -> None:
        """Send this process's wishes; they are read by the next `agreed`. One int64 all-reduce of two, asynchronous."""
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
        """What was posted a step ago, by all; and post anew. Collective; waits for what is a step old.

        step: how many are done, for the others to know; None leaves it, as in an evaluation.
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
        """The sum of an int64 tensor over all processes, as ints. Collective and a host sync: for log points only."""
        mine = sums.cpu()
        if self._control is not None:
            import torch.distributed as dist

            dist.all_reduce(mine, group=self._control)
        return [int(value) for value in mine.tolist()]

    def least(self, value: int) -> int:
        """The least of all processes' values. Collective."""
        if self._control is None:
            return value
        import torch
        import torch.distributed as dist

        box = torch.tensor(value)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._control)
        return int(box.item())

    def from_main(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 alone; every rank returns its result or raises its DtrainError. Collective."""
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
        """`work(True)` on rank 0; where that went well `work(False)` on the others. Its DtrainError is everybody's."""
        mine: list[T] = []
        self.from_main(lambda: mine.append(work(True)))
        return mine[0] if mine else work(False)

    def same(self, value: str, what: str) -> None:
        """Raise ProcessError on every rank unless all gave the same `value`. Collective; no cost per rank on rank 0."""
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
        """The error that ends the run, told by one process: `told_elsewhere` is set on the others'.

        A process that fails by itself is the first to tell. One whose collective failed gives that error of the other
        again, so that all end with one reason and one exit code; if nobody told any, it waits two beats to see who
        still moves, and names who fell silent.
        """
        if self._witness is None:  # all of us meet the same error before we meet, unless we do not meet
            told = not self.is_main and not isinstance(error, ProcessError)
            setattr(error, "told_elsewhere", told)  # noqa: B010 - read by __main__, which prints
            return error
        cause = error
        if _is_of_a_collective(error):
            cause = self._witness.told_by_another() or self._witness.silent()
        setattr(cause, "told_elsewhere", not self._witness.tell(cause))  # noqa: B010
        self._witness.let_others_hear()
        return cause


def _is_of_a_collective(error: Exception) -> bool:
    """Whether torch.distributed failed: a DistError, or a RuntimeError that names the back end's source."""
    text = str(error).lower()
    known = type(error).__name__.startswith("Dist") or "gloo" in text or "nccl" in text
    return isinstance(error, RuntimeError) and known


def _within(seconds: float, work: Callable[[], T]) -> T:
    """`work`, done in a thread of its own: torch waits for ever for a server that is no store and never answers.

    Raises RuntimeError if it takes longer than `seconds`; the thread is then left to the end of the process.
    """
    results: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:
            results.put(error)

    threading.Thread(target=run, name="dtrain-meet", daemon=True).start()
    try:
        result = results.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError("who listens there does not answer as torch's store does") from None
    if isinstance(result, Exception):
        raise result
    return result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _choose_interface() -> None:
    """Name the interface of the route to MASTER_ADDR for gloo and nccl, unless the user has.

    By itself gloo binds what the host's own name resolves to, which on Debian is 127.0.1.1: one process is then
    refused and the other hangs.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        except (OSError, LookupError, ValueError):  # `meet` tells
            return
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR of linux/sockios.h
                if socket.inet_ntoa(answer[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
