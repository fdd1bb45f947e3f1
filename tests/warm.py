"""Processes for tests: one warm parent imports torch and dtrain once and forks every rank from there.

Starting two ranks by torchrun costs three imports of torch, in series; forking them costs some milliseconds. The
parent never computes, so its children start with no OpenMP pool that a fork would break (tests/test_warm.py).

    test process --(pipe: one request, one answer)--> warm parent --(fork)--> rank 0, rank 1, ...

A rank is what `python -m dtrain ...` would be: its own session, environment, standard streams and a normal end of the
interpreter. Nothing outlives the test session: ranks die with the warm parent (the kernel sees to it), and the warm
parent, which adopts whatever its ranks leave behind, ends all of it when its pipe closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[1]
POLL_SECONDS = 0.01
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Result(NamedTuple):
    """How one rank ended. `code` is the exit code, or minus the signal that killed it, as in subprocess."""

    code: int
    out: str
    err: str


class Job:
    """The ranks of one start, running or ended."""

    def __init__(self, warm: Warm, pids: list[int], folder: Path) -> None:
        self.pids = pids
        self.folder = folder
        self._warm = warm
        self._codes: dict[int, int] = {}

    def codes(self) -> list[int | None]:
        """The exit code of each rank so far, None while it runs. A rank that nobody asked about keeps its pid."""
        for pid in self.pids:
            if pid not in self._codes and (code := self._warm.ask("poll", pid)) is not None:
                self._codes[pid] = code
        return [self._codes.get(pid) for pid in self.pids]

    def send_signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to each; a rank that has ended is left alone."""
        chosen = self.pids if rank is None else [self.pids[rank]]
        for pid in chosen:
            if pid not in self._codes:
                os.kill(pid, number)  # a zombie until polled, so the number cannot have passed to a stranger

    def out(self, rank: int = 0) -> str:
        """What a rank has written to standard output so far."""
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        """What a rank has written to standard error so far."""
        return (self.folder / f"{rank}.err").read_text()

    def wait_for(self, text: str, rank: int = 0, timeout: float = 60) -> None:
        """Wait until a rank has written `text`. AssertionError if it ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while text not in self.out(rank) + self.err(rank):
            if self.codes()[rank] is not None or time.monotonic() > deadline:
                self._abort()
                raise AssertionError(f"rank {rank} did not write {text!r}:\n{self.report()}")
            time.sleep(POLL_SECONDS)

    def wait(self, timeout: float = 60) -> list[Result]:
        """Wait for all ranks to end. After `timeout` seconds they write the stacks of all threads to standard error
        and are killed, and AssertionError shows the end of it."""
        self._settle(timeout)
        if None in self.codes():
            self._abort()
            raise AssertionError(f"still running after {timeout} s:\n{self.report()}")
        return [Result(self._codes[pid], self.out(rank), self.err(rank)) for rank, pid in enumerate(self.pids)]

    def report(self) -> str:
        """The last lines of each rank, for the message of a failed test."""
        parts = []
        for rank, code in enumerate(self.codes()):
            text = self.out(rank) + self.err(rank)
            parts.append(f"--- rank {rank}, exit code {code}\n" + "\n".join(text.splitlines()[-40:]))
        return "\n".join(parts)

    def kill(self) -> None:
        """Kill every rank that still runs, with what it started in its process group, and wait for its end."""
        for pid in self.pids:
            if pid not in self._codes:
                os.killpg(pid, signal.SIGKILL)
        self._settle(10.0)

    def _abort(self) -> None:
        self.send_signal(signal.SIGABRT)
        self._settle(2.0)
        self.kill()

    def _settle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


class Warm:
    """The test session's end of the pipe. `folder` takes what the ranks write; call `close` at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: list[Job] = []
        self._pipe, theirs = Pipe()
        # read when libgomp is loaded, so it must be there before the import; a rank may still set its own threads
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, cwd=REPOSITORY)
        theirs.close()

    def __call__(
        self, argv: Sequence[object], world: int = 2, timeout: float = 60, env: Mapping[str, str] | None = None
    ) -> list[Result]:
        """Run `python -m dtrain *argv` in each of `world` ranks to its end, and return how each ended.

        With world 1 it is a plain process: no RANK, no process group, as without torchrun. `env` is added to the
        environment of the test. Standard input is empty; the working directory is the test's.
        """
        return self.start(argv, world, env).wait(timeout)

    def start(self, argv: Sequence[object], world: int = 2, env: Mapping[str, str] | None = None) -> Job:
        """The same without waiting: signal single ranks through the Job, then `wait`."""
        return self._start("warm:run_dtrain", {"argv": [str(word) for word in argv]}, world, env)

    def start_call(
        self,
        target: str,
        world: int = 2,
        kwargs: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Job:
        """Run `module:function` of a test module (or of anything importable) in each rank, without waiting."""
        return self._start(target, dict(kwargs or {}), world, env)

    def call(
        self,
        target: str,
        world: int = 2,
        kwargs: Mapping[str, Any] | None = None,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Run `module:function(**kwargs)` in each rank and return what each returned (pickled on the way).

        AssertionError with the ranks' last lines if one does not end with 0.
        """
        job = self.start_call(target, world, kwargs, env)
        if any(result.code != 0 for result in job.wait(timeout)):
            raise AssertionError(f"{target} failed:\n{job.report()}")
        return [pickle.loads((job.folder / f"{rank}.value").read_bytes()) for rank in range(world)]

    def ask(self, *request: Any) -> Any:
        """One request to the warm parent and its answer."""
        self._pipe.send(request)
        return self._pipe.recv()

    def end_jobs(self) -> None:
        """Kill the ranks that still run, with their process groups; nothing happens to those that have ended."""
        for job in self._jobs:
            job.kill()

    def close(self) -> None:
        """End the warm parent and every process that came from it."""
        self._pipe.close()
        self._process.wait(timeout=30)

    def _start(self, target: str, kwargs: dict[str, Any], world: int, env: Mapping[str, str] | None) -> Job:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        port = free_port()
        ranks = [{**environment, **_rank_variables(rank, world, port)} for rank in range(world)]
        for stream in (f"{rank}.{name}" for rank in range(world) for name in ("out", "err")):
            (folder / stream).touch()
        pids = [
            self.ask("fork", target, kwargs, str(Path.cwd()), variables, str(folder / str(rank)))
            for rank, variables in enumerate(ranks)
        ]
        job = Job(self, pids, folder)
        self._jobs.append(job)
        return job


def free_port() -> int:
    """A TCP port of this host that nobody listens on, and that the kernel gives to nobody before it is used."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first_given // 2, first_given)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _rank_variables(rank: int, world: int, port: int) -> dict[str, str]:
    if world == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


# ---- from here on: in the warm parent and in the ranks ----


def run_dtrain(argv: list[str]) -> None:
    """`python -m dtrain *argv`, to the letter."""
    sys.argv = ["dtrain", *argv]
    runpy.run_module("dtrain", run_name="__main__", alter_sys=True)


def serve(pipe: Connection) -> tuple[Any, ...] | None:
    """Answer requests until the pipe closes. Returns twice for a fork: in the child, with what it has to run."""
    while True:
        try:
            verb, *details = pipe.recv()
        except EOFError:
            return None
        if verb == "poll":
            pid, status = os.waitpid(details[0], os.WNOHANG)
            pipe.send(os.waitstatus_to_exitcode(status) if pid else None)
        elif child := os.fork():
            pipe.send(child)
        else:
            pipe.close()
            return tuple(details)


def run(target: str, kwargs: dict[str, Any], folder: str, environment: dict[str, str], name: str) -> None:
    """In a fresh fork: become the rank that the request describes, and call its target."""
    os.setsid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, f"{name}.out", f"{name}.err")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    faulthandler.enable()  # SIGABRT of a timed-out test shows where each thread stands
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(**kwargs)
    Path(f"{name}.value").write_bytes(pickle.dumps(value))


def warm_up() -> None:
    """Import what every rank needs. Nothing here may compute: a fork after OpenMP has started would hang."""
    # every optimizer imports torch._dynamo when it is built, which takes a second; with it comes triton, which is of no
    # use on a CPU and complains at the end of each rank of what it has leaked
    sys.modules["triton"] = None  # type: ignore[assignment]  # an import of it now fails
    for module in ("torch.distributed", "torch.nn.parallel", "torch._dynamo", "numba", "dtrain.cli", "dtrain.training"):
        with contextlib.suppress(Exception):  # then the ranks that need it fail and say why, and no others
            importlib.import_module(module)
    del sys.modules["triton"]
    gc.freeze()  # else a rank's last collection walks, and so copies, all that torch has made


def end_all_children() -> None:
    """Kill and reap children until there are none, including those that their own parents left behind."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            os.wait()


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """The warm parent's life; a rank leaves `serve` with its task and ends like any other interpreter."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test session, which then closes the pipe
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    warm_up()
    task = serve(Connection(int(sys.argv[1])))
    if task is None:
        end_all_children()
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(*task)


if __name__ == "__main__":
    main()
