"""What the processes of a run leave for each other in their store: where each runs, how far it came, what went wrong.

Because of it one error ends all processes with one line and one exit code, and a process that died or hangs is named.
The store is torch's and is handed in by rendezvous.py. When the process that keeps it is gone, it raises RuntimeError.
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
    """What one process tells and sees. store: a connection of its own; neighbours: the ranks on this host."""

    def __init__(self, store: Any, rank: int, size: int, neighbours: range, timeout_seconds: float) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._store, self._neighbours = store, neighbours
        self._killed_before = killed_for_memory()
        store.set(f"where/{rank}", f"{_host()} {os.getpid()}")
        self.beat = _Beat(store, rank)

    def all_at(self, point: str, seconds: float) -> None:
        """Wait until all processes have come to `point`. Collective.

        Raises the error that another process leaves meanwhile. Raises ProcessError after `seconds`, at once when a
        process of this host has died, and when the next process has sent no heartbeat for a whole time-out.
        """
        self._store.set(f"at {point}/{self.rank}", "")
        if self._store.add(point, 1) == self.size:
            self._store.set(f"all {point}", "")
        pause, moved = POLL_SECONDS, time.monotonic()
        deadline = moved + seconds
        after, beat = (
            (self.rank + 1) % self.size,
            "",
        )  # each watches only the next one, so no work grows with their number
        # polled, because a client that waits inside the store would hold back its own heartbeat
        while not self._store.check([f"all {point}"]):
            if self._store.check(["error"]):
                break
            now = time.monotonic()
            if now > deadline:
                missing = [rank for rank in range(self.size) if not self._store.check([f"at {point}/{rank}"])]
                raise self.told_by_another() or self._gone(missing, f"did not come within {seconds:g} s")
            if pause >= BEAT_SECONDS / 4:  # this takes longer than an ordinary start
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
        """Leave `text` under `name` for the other processes of this host."""
        self._store.set(f"{name}/{self._neighbours.start}", text)

    def handed_over(self, name: str) -> str:
        """What the first process of this host has left under `name`; "" for nothing."""
        return self._read(f"{name}/{self._neighbours.start}")

    def let_others_hear(self) -> None:
        """Note that this process knows the error; process 0, which may keep the store, waits two beats for all."""
        deadline, others = time.monotonic() + 2 * BEAT_SECONDS, set(range(1, self.size))
        with contextlib.suppress(RuntimeError):
            self._store.set(f"heard/{self.rank}", "")
            while self.rank == 0 and others and time.monotonic() < deadline:
                others = {rank for rank in others if not self._store.check([f"heard/{rank}"])} - set(self._dead())
                time.sleep(0.02)

    def tell(self, error: Exception) -> bool:
        """Leave an error in the store for the others; False if another process has already left one.

        Where the store is gone nobody knows who was first, and a DtrainError then counts as told by another.
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
        """The error that another process left, or its death without one; None if neither shows within two beats."""
        deadline = time.monotonic() + 2 * BEAT_SECONDS
        try:
            while not self._store.check(["error"]):
                if time.monotonic() > deadline:
                    return None
                died = self._died()
                if died is not None and not self._store.check(["error"]):  # otherwise it left its error before it ended
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
        """What stands in the store under `key`; "" where nothing does, since `get` would wait for a whole time-out."""
        return str(self._store.get(key).decode()) if self._store.check([key]) else ""

    def _died(self) -> ProcessError | None:
        """The error that names the first process of this host that has died, if one has."""
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
        """The error that names the processes which stopped answering, found within three beats.

        They are those that neither gave up as this one does nor sent a heartbeat meanwhile; where there are none, all
        that did not give up.
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
        """How far a process came, in words."""
        beat = self._read(f"beat/{rank}")
        if not beat:
            return "it never came"
        step = beat.split()[0]
        return "seen before its first step" if step == NO_STEP else f"seen at step {step}"


class _Beat:
    """A thread that writes this process's progress to the store every second, so that one that hangs can be named."""

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
            except RuntimeError:  # the store is gone; the next collective fails and is explained
                return

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _host() -> str:
    """Where process ids mean the same as here: the host's name and its namespace of process ids."""
    return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"


def _lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"  # a dead process is a zombie until its parent waits for it


def killed_for_memory() -> int:
    """How many processes this host's kernel has killed for lack of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
