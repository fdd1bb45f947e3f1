"""Runs trackers beside a run: for each tracker a process reads metrics.jsonl as it grows, and gives it the new rows.

    trainer, rank 0                         python -m dtrain.run.tracking RUN wandb follow
      a row into metrics.jsonl
      a byte into the pipe     ------->     wakes, reads the new lines, gives them to the tracker
      at the end at most LIMIT_SECONDS, then it is killed

The file is the queue, so no row is lost if a tracker falls behind. `dtrain sync` starts the same process after the run;
it reads the file from its beginning, for the rows that a tracker has missed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from dtrain.errors import ExitCode, UsageError
from dtrain.files import Lock
from dtrain.plugins import load
from dtrain.run.console import shown
from dtrain.run.rows import EventRow, Row, parsed
from dtrain.run.rundir import CONFIG, LOCK, METRICS, read_record
from dtrain.run.trackers import NOTHING, About, State, Tracker, find, position
from dtrain.settings.layers import read_config
from dtrain.world import STOP_SIGNALS

FOLDER = "trackers"  # of a run directory; in it a folder for each tracker
LOG = "log.txt"  # the output of the tracker and its package
LIMIT_SECONDS = 3.0  # at its end a run waits at most so long for all trackers together
ORPHAN_SECONDS = 60.0  # after a run was killed, its trackers end after at most this time
ROW, END = b"\n", b"."  # what the trainer writes into the pipe


def folder_of(run: Path, name: str) -> Path:
    """The folder for a tracker's state, log and files. A slash in its name is quoted, so that it is a single folder."""
    return run / FOLDER / quote(name, safe=":")


class Tracking:
    """The tracker processes of a run, as the training process controls them.

    No method raises or starts a thread, and only `close` waits. Cost: one process is started for each tracker; one
    system call for each row and tracker.
    """

    def __init__(self, run: Path, names: Sequence[str]) -> None:
        self._run = run
        self._last = NOTHING  # position of the last row
        self._followers: dict[str, subprocess.Popen[bytes]] = {}
        self._failed: dict[str, str] = {}
        for name in dict.fromkeys(names):
            try:
                self._followers[name] = self._start(name)
            except OSError as error:
                self._failed[name] = f"cannot be started: {error.strerror}"

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        folder = folder_of(self._run, name)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("ab") as log:
            # in a session of its own, so that Ctrl-C on the terminal reaches the trainer alone
            follower = subprocess.Popen(
                _command(self._run, name, "follow"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        if follower.stdin is not None:
            os.set_blocking(follower.stdin.fileno(), False)
        return follower

    def row(self, row: Row) -> None:
        """Tell the trackers that a row has been added to metrics.jsonl."""
        if not isinstance(row, EventRow):
            self._last = max(self._last, position(row))
        self._ring(ROW)

    def _ring(self, byte: bytes) -> None:
        for follower in self._followers.values():
            # An error does no harm: a full pipe holds bytes already that will wake the tracker, and a broken pipe means
            # that the tracker has died, which `close` reports.
            with contextlib.suppress(OSError):
                if follower.stdin is not None:
                    follower.stdin.write(byte)

    def close(self) -> list[tuple[str, bool]]:
        """End the trackers, within LIMIT_SECONDS, or at once after Ctrl-C.

        Returns for each a message for the user, and whether it lacks rows.
        """
        self._ring(END)
        deadline = time.monotonic() + LIMIT_SECONDS
        for name, follower in self._followers.items():
            try:
                follower.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._failed[name] = f"did not end within {LIMIT_SECONDS:g} s"
            except KeyboardInterrupt:
                self._failed[name], deadline = "was not waited for", 0.0
            if follower.returncode is None:
                _kill(follower)
            elif follower.returncode:
                self._failed[name] = f"ended with {follower.returncode}, see {folder_of(self._run, name) / LOG}"
            if follower.stdin is not None:
                follower.stdin.close()
        told = [self._told(name) for name in dict.fromkeys([*self._followers, *self._failed])]
        self._followers = {}
        return told

    def _told(self, name: str) -> tuple[str, bool]:
        state = State.read(folder_of(self._run, name))
        if state.held >= self._last:
            return f"{name}: {state.where or 'there was nothing to send'}", False
        reason = state.error or self._failed.get(name, "it does not have all rows yet")
        return f"{name}: {reason}; nothing is lost: dtrain sync {shown(self._run)} sends the missing rows", True


def _command(run: Path, name: str, how: str) -> list[str]:
    return [sys.executable, "-m", "dtrain.run.tracking", str(run), name, how]


def _kill(follower: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(follower.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a disk cannot be killed
        follower.wait(0.2)


def sync(run: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Give all rows of a run that has ended to trackers, which store those that they lack. Their packages may print.

    names: of the trackers; if empty, those that have followed the run.
    Returns a dictionary for each: tracker, where, error. Raises UsageError for a run that does not exist or has not
    ended, and if there is no tracker.
    """
    record = read_record(run)
    if record is None:
        raise UsageError(f"{run}: no run is there; give a run directory")
    if Lock(run / LOCK).is_held():
        raise UsageError(f"{run} is still running; sync it when it has ended")
    if not names:
        names = sorted(unquote(path.name) for path in (run / FOLDER).glob("*/"))
    if not names:
        raise UsageError(f"{run} was not tracked; name a tracker: --track wandb")
    find(names)
    results = []
    for name in names:
        if (lock := Lock(folder_of(run, name) / LOCK)).is_held():
            raise UsageError(f"{folder_of(run, name)} is in use by {lock.owner()}; try again when that has ended")
        folder_of(run, name).mkdir(parents=True, exist_ok=True)
        code = subprocess.run(_command(run, name, "again"), stdin=subprocess.DEVNULL, check=False).returncode
        state = State.read(folder_of(run, name))
        error = (state.error or f"ended with {code}") if code else None
        results.append({"tracker": name, "where": state.where, "error": error})
    return results


# -- in a tracker's own process ----------------------------------------------------------------------------------------


def follow(run: Path, name: str, wait: Callable[[], bool], *, live: bool) -> State:
    """Give a tracker the rows that it lacks, each time that `wait` returns True, and once more when it returns False.

    live: see Tracker. Returns the tracker's state at the end. Raises whatever the tracker raises.
    """
    folder = folder_of(run, name)
    known = replace(State.read(folder), error=None)
    # `dtrain sync` offers all rows, since a server may have lost some: a tracker with a state knows which it lacks
    state = known if live else replace(known, held=NOTHING)
    tracker: Tracker | None = None
    last = NOTHING  # position of the last row that was given to the tracker
    more = wait()  # nothing is read before: until the first row is announced, a resume may still cut the file back
    lines = _lines(run / METRICS)
    while True:
        while (row := next(lines)) is not None:
            if isinstance(row, EventRow) or position(row) <= state.held:
                continue
            if tracker is None:
                tracker = load(find([name])[0])(folder, _about(run), state, live=live)
                state = getattr(tracker, "state", known)
                lines = _lines(run / METRICS)  # from the beginning, since the tracker may want earlier rows too
            else:
                tracker.write(row)
                last = position(row)
        if not more:
            break
        more = wait()
    if tracker is not None:
        record = read_record(run)
        closed = tracker.close(record.exit_code if record is not None else None)
        state = closed or replace(state, held=max(last, state.held), where=state.where or str(folder))
    state.write(folder)
    return state


def _lines(path: Path) -> Iterator[Row | None]:
    """The rows of a growing file; yields None whenever there is no further complete line. Never ends."""
    while not path.exists():  # no row has been written yet
        yield None
    with path.open("rb") as file:
        line = b""
        while True:
            line += file.readline()
            if not line.endswith(b"\n"):
                yield None
                continue
            with contextlib.suppress(ValueError):  # a damaged line is skipped here; `read_rows` reports it
                if (row := parsed(line)) is not None:
                    yield row
            line = b""


def _about(run: Path) -> About:
    record = read_record(run)
    names = ("environment", "versions", "resolved", "plugins")
    facts = {name: getattr(record, name) for name in names} if record is not None else {}
    return About(run.resolve().name, read_config(run / CONFIG), facts)


def _bell() -> bool:
    """Wait for the training process. Returns True if it announces a row, False if it has ended.

    After its end, this process is killed if it takes longer than ORPHAN_SECONDS.
    """
    data = os.read(0, 1 << 16)
    if data and END not in data:
        return True
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)  # SIGALRM then ends this process, even inside foreign code
    return False


def main(run: Path, name: str, how: str) -> int:
    """Run a tracker's process; returns its exit code. After an error that is 1, and the reason is in the state.

    how: "follow" beside a run that goes on, "again" for `dtrain sync`.
    """
    live, folder = how == "follow", folder_of(run, name)
    if live:
        for number in STOP_SIGNALS:  # these are meant for the training process, after which a tracker ends anyway
            signal.signal(number, signal.SIG_IGN)
    lock = Lock(folder / LOCK)
    while not lock.acquire():  # the tracker of a run that was killed a moment ago may still be busy
        time.sleep(0.2)
    try:
        bells = iter((True, False))
        follow(run, name, _bell if live else lambda: next(bells), live=live)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            replace(State.read(folder), error=reason).write(folder)
            traceback.print_exc()  # into the log
        return ExitCode.DEFECT
    return ExitCode.DONE


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the exit handlers of packages, which may hang, and `dtrain sync` with them
