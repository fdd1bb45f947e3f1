"""What can go wrong, and the exit code that says which.

    DtrainError
    |-- UsageError     2   a flag, a setting, a plugin
    |   `-- PluginError
    |-- DataError      3   a source, a beton, a label
    |-- ProcessError   4   a process died or hung
    |-- DivergedError  5   a loss or a weight that is not finite
    |-- StorageError   6   a disk that is full, read-only or damaged
    |-- ProofError     7   a bar or a proof missed
    `-- Stopped       75   asked to stop, saved: run it again

Every message is one line that says what was asked, what was found and what to do. The library raises; the
command line prints it once and exits with the code; `run.json` keeps both, since torchrun turns every failure into 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

EXIT_STOPPED_UNSAVED = 130
MOST_CHOICES = 100  # that an error line lists; a family may have thousands


class DtrainError(Exception):
    """Anything dtrain can explain in one line; `exit_code` is what the process ends with.

    table: more about it for a terminal, which the command line prints above the line.
    """

    exit_code: ClassVar[int] = 1
    table: str = ""


class UsageError(DtrainError):
    """A flag, a setting or a combination of them that cannot be honoured."""

    exit_code = 2


class PluginError(UsageError):
    """A plugin or a recipe that is not there, cannot be imported or does not keep its contract."""


class DataError(DtrainError):
    """A source or a beton that cannot be read, or does not hold what it says."""

    exit_code = 3


class ProcessError(DtrainError):
    """A process of this run died, hung or left."""

    exit_code = 4


class DivergedError(DtrainError):
    """A loss, gradient or weight is not finite."""

    exit_code = 5


class StorageError(DtrainError):
    """A run directory or checkpoint that cannot be written, read or trusted."""

    exit_code = 6


class ProofError(DtrainError):
    """`dtrain prove` or a benchmark's bar found a difference."""

    exit_code = 7


class Stopped(DtrainError):
    """The run was asked to stop (a signal, `--max-time`), has saved, and goes on when run again."""

    exit_code = 75


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
