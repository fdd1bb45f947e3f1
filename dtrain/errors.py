"""The exceptions of dtrain and the exit code of each.

    DtrainError
    |-- UsageError     2   a flag, a setting or a plugin
    |   `-- PluginError
    |-- DataError      3   the source of a data set, a converted file (beton) or a label
    |-- ProcessError   4   a process died or hung
    |-- DivergedError  5   a loss or a weight that is not finite
    |-- StorageError   6   a disk that is full, read-only or damaged
    |-- ProofError     7   a proof or a benchmark that failed
    `-- Stopped       75   the run was asked to stop and has saved: run it again

Every message is one line that says what was asked, what was found and what to do. The library raises these exceptions;
the command line prints the message once and exits with the code. `run.json` keeps both, because torchrun's own exit
code is 1 for every failure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """The exit codes of dtrain's processes."""

    DONE = 0
    DEFECT = 1  # an exception that nobody expected, in dtrain or in a plugin
    USAGE = 2
    DATA = 3
    PROCESS = 4
    DIVERGED = 5
    STORAGE = 6
    PROOF = 7
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the run was stopped and has saved; run it again to continue
    STOPPED_UNSAVED = 130  # stopped before anything was saved; what a shell reports after Ctrl-C


MOST_CHOICES = 100  # the most names that an error lists; a family of plugins may have thousands


class DtrainError(Exception):
    """An error that dtrain can explain in one line.

    exit_code: the exit code of the process; every class has its own default.
    table: details for a terminal, which the command line prints above the message.
    told_elsewhere: True if another process of the run prints the message, False if this one does. None means that this
    is not decided, as for a wrong flag, which every process finds by itself: the first process of each host prints it.
    """

    exit_code: ExitCode = ExitCode.DEFECT

    def __init__(
        self, message: str, exit_code: ExitCode | None = None, table: str = "", told_elsewhere: bool | None = None
    ) -> None:
        super().__init__(message)
        self.exit_code = type(self).exit_code if exit_code is None else exit_code
        self.table = table
        self.told_elsewhere = told_elsewhere

    def told(self, *, elsewhere: bool) -> Self:
        """A copy of this error, with its traceback and cause, that knows whether another process prints it."""
        same = type(self)(str(self), self.exit_code, self.table, elsewhere)
        same.__cause__, same.__suppress_context__ = self.__cause__, self.__suppress_context__
        return same.with_traceback(self.__traceback__)


class UsageError(DtrainError):
    """A flag, a setting or a combination of them that cannot be honoured."""

    exit_code = ExitCode.USAGE


class PluginError(UsageError):
    """A plugin or a recipe that does not exist, cannot be imported or breaks its contract (plugins/README.md)."""


class DataError(DtrainError):
    """A data set's source or a converted file (beton) that cannot be read or is not what it should be."""

    exit_code = ExitCode.DATA


class ProcessError(DtrainError):
    """A process of this run died, hung, or could not be reached."""

    exit_code = ExitCode.PROCESS


class DivergedError(DtrainError):
    """A loss, gradient or weight is not finite."""

    exit_code = ExitCode.DIVERGED


class StorageError(DtrainError):
    """A run directory or checkpoint that cannot be written, read or trusted."""

    exit_code = ExitCode.STORAGE


class ProofError(DtrainError):
    """`dtrain prove` found a difference between runs, or a command that a benchmark ran has failed."""

    exit_code = ExitCode.PROOF


class Stopped(DtrainError):
    """The run was asked to stop (by a signal or `--max-time`) and has saved; the same command continues it."""

    exit_code = ExitCode.STOPPED


def exit_code_of(error: Exception) -> ExitCode:
    """The exit code for any exception; one that is not a DtrainError counts as a defect."""
    return error.exit_code if isinstance(error, DtrainError) else ExitCode.DEFECT


def nearest(asked: str, choices: Iterable[str]) -> str:
    """A suggestion to end an error message with: the one of `choices` that is spelled most like `asked`.

    nearest("adamv", ["adam", "sgd"]) == "did you mean 'adam'?"; if none is similar, "choose from: adam, sgd", with the
    first MOST_CHOICES names at most.
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f", ... ({len(known)} in all)" if len(known) > MOST_CHOICES else ""
    return "choose from: " + ", ".join(known[:MOST_CHOICES]) + more if known else "there are none"
