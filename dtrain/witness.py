"""Failure detection: through a shared store, processes tell each other where they run, their progress and their errors.

So one error ends all processes of a run with one line and one exit code, and a process that died or hangs is named.
The store is one of torch.distributed's, made by rendezvous.py. Its methods raise RuntimeError once the process that
serves it is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import DtrainError, ExitCode, ProcessError, exit_code_of

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.005
NO_STEP = "-"


class Witness:
    """One process's view of the others. store: a connection that nothing else uses; neighbours: this host's ranks."""

    def __init__(self, store: Any, rank: int, size: int, neighbours: range, timeout_seconds: float) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._store, self._neighbours = store, neighbours
        self._killed_before = killed_for_memory()
        store.set(f"where/{rank}", f"{_host()} {os.getpid()}")
        self.beat = _Beat(store, rank)

    def all_at(self, point: str, seconds: float) -> None:
        """A barrier called `point`: wait until all processes have reached it. Collective.

        Raises the error of another process that fails meanwhile. Raises ProcessError after `seconds`, soon after a
        process of this host has died, or if the process of the next rank sends no heartbeat for `timeout_seconds`.
        """
        self._store.set(f"at {point}/{self.rank}", "")
        if self._store.add(point, 1) == self.size:
            self._store.set(f"all {point}", "")
        pause, moved = POLL_SECONDS, time.monotonic()
        deadline = moved + seconds
        # each process watches only the next rank, so that its work does not grow with their number
        after, beat = (self.rank + 1) % self.size, ""
        # polled, because the heartbeat shares this connection, which a blocking wait would occupy
        while not self._store.check([f"all {point}"]):
            if self._store.check(["error"]):
                break
            now = time.monotonic()
            if now > deadline and (missing := self._missing(point)):
                raise self.told_by_another() or self._gone(missing, f"did not come within {seconds:g} s")
            if pause >= BEAT_SECONDS / 4:  # the wait is longer than usual: look for processes that died or hang
                if (died := self._died()) is not None and not self._store.check(["error"]):
                    raise died
                if (seen := self._read(f"beat/{after}")) != beat:
                    beat, moved = seen, now
                if now - moved > self.timeout_seconds:
                    raise self.told_by_another() or self._gone([after], "stopped answering")
            time.sleep(pause)
            pause = min(2 * pause, BEAT_SECONDS / 4)
        if self._store.check(["error"]) and (told := self.told_by_another()) is not None:
            raise told

    def hand_over(self, name: str, text: str) -> None:
        """Store `text` under `name` for the other processes of this host."""
        self._store.set(f"{name}/{self._neighbours.start}", text)

    def handed_over(self, name: str) -> str:
        """The text that the first process of this host has stored under `name`; "" if there is none."""
        return self._read(f"{name}/{self._neighbours.start}")

    def _missing(self, point: str) -> list[int]:
        """The ranks that have not reached the barrier `point`."""
        return [rank for rank in range(self.size) if not self._store.check([f"at {point}/{rank}"])]

    def let_others_hear(self) -> None:
        """Record that this process knows the error. Process 0, which may serve the store, then waits for the others.

        It waits until every other process has recorded the same or has died on this host, two heartbeats at most.
        """
        deadline, others = time.monotonic() + 2 * BEAT_SECONDS, set(range(1, self.size))
        with contextlib.suppress(RuntimeError):
            self._store.set(f"heard/{self.rank}", "")
            while self.rank == 0 and others and time.monotonic() < deadline:
                others = {rank for rank in others if not self._store.check([f"heard/{rank}"])} - set(self._dead())
                time.sleep(0.02)

    def tell(self, error: Exception) -> bool:
        """Put this process's error into the store for the others; returns whether this process should print it.

        That is False if another process has already stored one. If the store is gone, it is not known who was first: a
        DtrainError then counts as printed by another process, and any other error is printed here.
        """
        try:
            if int(self._store.add("told", 1)) != 1:
                return False
            line = str(error) if isinstance(error, DtrainError) else f"{type(error).__name__}: {error}"
            self._store.set("error", f"{exit_code_of(error):d} {line}")
        except RuntimeError:  # the store is gone, with process 0
            return not isinstance(error, DtrainError)
        return True

    def told_by_another(self) -> DtrainError | None:
        """The error that another process has stored; or, if a process of this host died without one, one that names it.

        None if there is neither within two heartbeats, or if the store is gone.
        """
        deadline = time.monotonic() + 2 * BEAT_SECONDS
        try:
            while not self._store.check(["error"]):
                if time.monotonic() > deadline:
                    return None
                died = self._died()
                if died is not None and not self._store.check(["error"]):  # it may have stored an error before it ended
                    return died
                time.sleep(0.05)
            code, _, line = self._store.get("error").decode().partition(" ")
        except RuntimeError:
            return None
        return ProcessError(line, ExitCode(int(code)))

    def _dead(self) -> Iterator[int]:
        """The ranks on this host whose processes have died."""
        for rank in self._neighbours:
            host, _, pid = self._read(f"where/{rank}").rpartition(" ")
            if host == _host() and not _lives(int(pid)):
                yield rank

    def _read(self, key: str) -> str:
        """The value of `key` in the store; "" if it has none, where `get` alone would wait for the time-out."""
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def _died(self) -> ProcessError | None:
        """An error that names the first process of this host that has died; None if all are alive."""
        if (rank := next(self._dead(), None)) is None:
            return None
        pid = self._read(f"where/{rank}").split()[-1]
        why = "if nobody killed it, memory may have run out: see dmesg"
        if killed_for_memory() > self._killed_before:
            why = "this host's kernel has killed a process for lack of memory meanwhile: try a smaller --batch-size"
        return ProcessError(
            f"process {rank} of {self.size} (pid {pid}, {self._seen(rank)}) died without a word; "
            f"{why}; run the same command again to go on from the last checkpoint"
        )

    def silent(self) -> ProcessError:
        """The error that names the processes which have stopped answering, for a process whose collective has failed.

        A process whose collective fails records that here. Those named are the processes that have not recorded it and
        send no heartbeat for 2.5 heartbeats; if there are none, all that have not recorded it.
        """
        try:
            self._store.set(f"gave up/{self.rank}", "")
            before = [self._read(f"beat/{rank}") for rank in range(self.size)]
            time.sleep(2.5 * BEAT_SECONDS)
            still = [rank for rank in range(self.size) if self._read(f"beat/{rank}") == before[rank]]
            waiting = [rank for rank in range(self.size) if not self._store.check([f"gave up/{rank}"])]
            silent = [rank for rank in waiting if rank in still] or waiting or list(range(self.size))
            return self._gone(silent, "stopped answering")
        except RuntimeError:
            return ProcessError("process 0, which keeps the store, went away; run the same command again to go on")

    def _gone(self, ranks: Sequence[int], what: str) -> ProcessError:
        listed = ", ".join(f"{rank} ({self._seen(rank)})" for rank in ranks[:8])
        return ProcessError(
            f"process {listed} of {self.size} {what} (--dist-timeout {self.timeout_seconds:g}); "
            "run the same command again to go on from the last checkpoint"
        )

    def _seen(self, rank: int) -> str:
        """The progress of a process, in words."""
        beat = self._read(f"beat/{rank}")
        if not beat:
            return "it never came"
        step = beat.split()[0]
        return "seen before its first step" if step == NO_STEP else f"seen at step {step}"


class _Beat:
    """The heartbeat: a thread that writes this process's step and a counter to the store every second."""

    def __init__(self, store: Any, rank: int) -> None:
        self.step = NO_STEP
        self._store, self._key, self._tick = store, f"beat/{rank}", 0
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="dtrain-beat", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        self._tick += 1
        self._store.set(self._key, f"{self.step} {self._tick}")

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._write()
            except RuntimeError:  # the store is gone; the next collective fails, and `World.explained` explains it
                return

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _host() -> str:
    """The host name and the PID namespace: two processes with the same of both see the same process ids."""
    return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # a dead process stays a zombie until its parent waits for it


def killed_for_memory() -> int:
    """How many processes this host's kernel has killed for lack of memory since it booted; 0 if it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
