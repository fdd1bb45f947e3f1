"""What can go wrong, and the exit code that says which.

    DtrainError
    |-- UsageError     2   a flag, a setting or a plugin
    |   `-- PluginError
    |-- DataError      3   a source, a beton or a label
    |-- ProcessError   4   a process died or hung
    |-- DivergedError  5   a loss or a weight that is not finite
    |-- StorageError   6   a disk that is full, read-only or damaged
    |-- ProofError     7   a bar or a proof missed
    `-- Stopped       75   the run was asked to stop and has saved: run it again

Every message is one line that says what was asked, what was found and what to do. The library raises; the command line
prints the line once and exits with the code. `run.json` keeps both, because torchrun turns every failure into 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """What a process of dtrain ends with."""

    DONE = 0
    DEFECT = 1  # an exception that nobody expected, in dtrain or in a plugin
    USAGE = 2
    DATA = 3
    PROCESS = 4
    DIVERGED = 5
    STORAGE = 6
    PROOF = 7
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, run it again
    STOPPED_UNSAVED = 130  # what a shell reports after Ctrl-C


MOST_CHOICES = 100  # that an error line lists; a family may have thousands


class DtrainError(Exception):
    """Anything that dtrain can explain in one line.

    exit_code: what the process ends with; every class has its own default.
    table: more about the error for a terminal, which the command line prints above the line.
    told_elsewhere: whether another process of the run prints the line. None means that nobody has decided it, as for a
    wrong flag, which all processes find alike: the first process of each host then prints it.
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
        """The same error with its stack and cause, once it is known which process prints it."""
        same = type(self)(str(self), self.exit_code, self.table, elsewhere)
        same.__cause__, same.__suppress_context__ = self.__cause__, self.__suppress_context__
        return same.with_traceback(self.__traceback__)


class UsageError(DtrainError):
    """A flag, a setting or a combination of them that cannot be honoured."""

    exit_code = ExitCode.USAGE


class PluginError(UsageError):
    """A plugin or a recipe that is not there, cannot be imported or does not keep its contract."""


class DataError(DtrainError):
    """A source or a beton that cannot be read, or that does not hold what it claims to hold."""

    exit_code = ExitCode.DATA


class ProcessError(DtrainError):
    """A process of this run died, hung or left."""

    exit_code = ExitCode.PROCESS


class DivergedError(DtrainError):
    """A loss, gradient or weight is not finite."""

    exit_code = ExitCode.DIVERGED


class StorageError(DtrainError):
    """A run directory or checkpoint that cannot be written, read or trusted."""

    exit_code = ExitCode.STORAGE


class ProofError(DtrainError):
    """`dtrain prove` or a benchmark found a difference, or a bar that was missed."""

    exit_code = ExitCode.PROOF


class Stopped(DtrainError):
    """The run was asked to stop (by a signal or `--max-time`), has saved, and goes on when it is run again."""

    exit_code = ExitCode.STOPPED


def exit_code_of(error: Exception) -> ExitCode:
    """The exit code of any exception: an error that dtrain cannot explain is a defect."""
    return error.exit_code if isinstance(error, DtrainError) else ExitCode.DEFECT


def nearest(asked: str, choices: Iterable[str]) -> str:
    """The end of an error line: the closest of `choices` to `asked`, else all of them, or the first of very many.

    nearest("adamv", ["adam", "sgd"]) == "did you mean 'adam'?"; with nothing close, "choose from: adam, sgd".
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f", ... ({len(known)} in all)" if len(known) > MOST_CHOICES else ""
    return "choose from: " + ", ".join(known[:MOST_CHOICES]) + more if known else "there are none"
