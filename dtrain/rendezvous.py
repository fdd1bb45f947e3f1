"""Connects the processes of a run and disconnects them: shared store, network interface, time-outs, process groups.

torch.distributed has one default process group, so a process takes part in one run at a time. A script may train
several times in a row under one launcher; each of its runs then has its own prefix for keys in the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from dtrain.errors import ProcessError
from dtrain.witness import BEAT_SECONDS, Witness

T = TypeVar("T")
WATCHDOG_GRACE = timedelta(seconds=60)

_run_numbers = itertools.count(1)  # numbers this process's runs; every process of a launcher starts the same runs
_last: Meeting | None = None  # that of the most recent run in this process


class Meeting:
    """The connection of this process to the others of its run. `witness` exchanges states and errors over the store."""

    def __init__(self, store: Any, witness: Witness) -> None:
        self.witness = witness
        self._store = store
        self.joined = False  # whether the process groups exist

    def join(self, backend: str) -> Any:
        """Create the default process group with `backend`, for gradients; returns a gloo group for control messages.

        Collective.
        """
        import torch.distributed as dist

        timeout = timedelta(seconds=self.witness.timeout_seconds)
        # NCCL's watchdog kills a process that waits too long. Its time-out is longer than gloo's, so that gloo fails
        # first, with an exception that dtrain can explain.
        patience = timeout + WATCHDOG_GRACE if backend == "nccl" else timeout
        rank, size = self.witness.rank, self.witness.size
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=patience)
        self.joined = True
        return dist.new_group(backend="gloo", timeout=timeout)

    def part(self) -> None:
        """Stop the heartbeat and destroy the process groups. All processes must have finished using them."""
        import torch.distributed as dist

        self.witness.beat.stop()
        if self.joined:
            self.joined = False
            dist.destroy_process_group()


def meet(rank: int, size: int, neighbours: range, timeout_seconds: float) -> Meeting:
    """Connect to the store that all `size` processes share, at MASTER_ADDR and MASTER_PORT. Collective.

    neighbours: the ranks on this host, this one included.
    Raises ProcessError if the store is not reached within the time-out, or if an earlier run of this process failed
    after it had created process groups: other processes may still wait in these, so they cannot be destroyed.
    """
    global _last
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

    if _last is not None:
        if _last.joined:
            raise ProcessError("an earlier run of this process has failed while it trained; begin the next in another")
        _last.part()

    if len(neighbours) < size:
        _choose_interface()
    timeout = timedelta(seconds=timeout_seconds)
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")

    def stores() -> tuple[Any, Any]:
        default = _default_store(rank, size, timeout, host, port)
        # the heartbeat needs its own connection, since the default group's may be blocked by a collective
        return default, TCPStore(host, int(port), is_master=False, timeout=timeout)

    try:
        default, client = _within(timeout_seconds + BEAT_SECONDS, stores)
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise ProcessError(
                f"port {port} of this host, where the processes are to meet, is in use; give torchrun another "
                "--master-port (or set another MASTER_PORT), or --standalone"
            ) from None
        raise ProcessError(
            f"process {rank} of {size} could not meet the others at {host}:{port} within "
            f"{timeout_seconds:g} s: {_first_line(error)}"
        ) from None
    # the prefix is unique to this run, because the store of torchrun's agent outlives runs and restarts of workers
    own = f"dtrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_run_numbers)}"
    witness = Witness(PrefixStore(own, client), rank, size, neighbours, timeout_seconds)
    _last = Meeting(PrefixStore(own, default), witness)
    return _last


@functools.cache
def _default_store(rank: int, size: int, timeout: timedelta, host: str, port: str) -> Any:
    """The store of torch's `env://` rendezvous, kept until the process ends.

    If process 0 serves the store, a second run could otherwise connect to the first run's server while it shuts down.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    return store


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Call `work` in a thread and return its result; raise RuntimeError if it takes longer than `seconds`.

    torch would wait forever for a server that is not a store and never answers. After a time-out the daemon thread is
    left running until the process ends.
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
        raise RuntimeError("whatever listens there does not answer as torch's store does") from None
    if isinstance(result, Exception):
        raise result
    return result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _choose_interface() -> None:
    """Have gloo and NCCL use the network interface that leads to MASTER_ADDR, unless the user has chosen one.

    By default gloo binds to the address that the host's name resolves to. On Debian that is 127.0.1.1, so that one
    process is refused and the other hangs.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        except (OSError, LookupError, ValueError):  # `meet` fails at the same address and explains it
            return
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR of linux/sockios.h
                if socket.inet_ntoa(answer[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
