"""`python -m dtrain` and `dtrain`: the one place where an error is told and an exit code is given."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from dtrain.errors import EXIT_STOPPED_UNSAVED, DtrainError, StorageError
from dtrain.runtime import tune_allocator
from dtrain.world import place

OF_OUTPUT = (errno.ENOSPC, errno.EPIPE, errno.EIO)
GROUP_FLAGS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit: 0, or the code of the error, which is told in one line on stderr."""
    tune_allocator()  # before anything allocates
    _heed_signals()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in GROUP_FLAGS:
        arguments.insert(0, "train")  # flags without a verb mean `train`
    code, told = 0, True
    is_run = arguments[:1] == ["train"]  # which is more than what it prints
    try:
        _recorded(arguments)
        if not is_run:
            sys.stdout.flush()  # else what was asked for may be lost unseen
    except DtrainError as error:
        code = error.exit_code
        # what is wrong with the command line itself, all processes of a host find alike: one of them tells
        told = not getattr(error, "told_elsewhere", place().local_rank > 0)
        if told:
            table = f"{error.table}\n" if error.table else ""
            _tell(f"error: {error}" if code != 75 else str(error), "--debug" in arguments, table)
    except KeyboardInterrupt:
        code = EXIT_STOPPED_UNSAVED
        _tell("stopped before anything could be saved", False)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else (0 if error.code is None else 1)
    except Exception as error:
        code = 1
        told = not getattr(error, "told_elsewhere", False)
        if isinstance(error, OSError) and error.errno in OF_OUTPUT and error.filename is None and not is_run:
            code = _unwritten(error)
        elif told:
            _tell(f"error: {type(error).__name__}: {error} (a defect of dtrain or of a plugin)", True)
    _leave(code, told)


def _heed_signals() -> None:
    """Until a run listens itself, let TERM and USR1 end one process as Ctrl-C does, with the same exit code.

    Of several processes they end each at once: Python's handlers would wait for a collective to return.
    """
    if place().size == 1:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)


def _recorded(arguments: list[str]) -> None:
    """Run the command; under torchrun inside torch's @record, so that the agent shows this worker's own error."""
    from dtrain.cli import run

    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        run(arguments)
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    record(run)(arguments)


def _tell(line: str, with_traceback: bool, table: str = "") -> None:
    with contextlib.suppress(OSError):  # nobody hears it: the exit code still says what it is
        if with_traceback:
            traceback.print_exc()
        # a plugin's own words may have several lines
        print(table + " ".join(line.split("\n")), file=sys.stderr)


def _unwritten(refused: OSError) -> int:
    """The exit code where standard output did not take all that was asked for. A reader that has left wants no more."""
    if isinstance(refused, BrokenPipeError):
        return 0
    _tell(f"error: standard output could not be written: {refused.strerror}; free some space", False)
    return StorageError.exit_code


def _leave(code: int, told: bool) -> None:
    """Exit. After an error among several processes at once: a gloo group waits for its peers while it is torn down."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what nobody takes goes nowhere; Python would try again at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code and told and (file := os.environ.get("DTRAIN_EXIT_CODE_FILE")):
        Path(file).write_text(str(code), encoding="ascii")  # for commands/launch.py
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
