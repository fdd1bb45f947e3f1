"""`python -m dtrain` and `dtrain`: the one place where an error is printed and the exit code is given."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from dtrain.commands.launch import CODE_FILE
from dtrain.errors import DtrainError, ExitCode, Stopped
from dtrain.runtime import tune_allocator
from dtrain.world import place

OF_OUTPUT = (errno.ENOSPC, errno.EPIPE, errno.EIO)
GROUP_FLAGS = ("--help", "-h", "--version", "--install-completion", "--show-completion")
TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun reads a worker's error there, and prints it at its own end


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and exit with 0 or with the code of the error, which is printed on stderr in one line."""
    tune_allocator()  # must happen before anything allocates
    _heed_signals()
    if TORCHRUN_FILE in os.environ:
        faulthandler.enable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in GROUP_FLAGS:
        arguments.insert(0, "train")  # flags without a verb mean `train`
    debug = "--debug" in arguments
    code, told = int(ExitCode.DONE), True
    is_run = arguments[:1] == ["train"]  # a run leaves more than what it prints
    try:
        from dtrain.cli import run

        run(arguments)
        if not is_run:
            sys.stdout.flush()  # otherwise the output that was asked for could be lost without an error
    except DtrainError as error:
        code = error.exit_code
        line = str(error) if isinstance(error, Stopped) else f"error: {error}"
        told = not (place().local_rank > 0 if error.told_elsewhere is None else error.told_elsewhere)
        if told:
            _tell(line, debug, f"{error.table}\n" if error.table else "")
        _leave_for_torchrun(line, debug)
    except KeyboardInterrupt:
        code, line = ExitCode.STOPPED_UNSAVED, "stopped before anything could be saved"
        _tell(line, False)
        _leave_for_torchrun(line, False)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else ExitCode.DEFECT if error.code else ExitCode.DONE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_OUTPUT and error.filename is None and not is_run:
            code = _unwritten(error)
        else:
            code, line = ExitCode.DEFECT, f"error: {type(error).__name__}: {error} (a defect of dtrain or of a plugin)"
            _tell(line, True)
            _leave_for_torchrun(line, True)
    _leave(code, told)


def _heed_signals() -> None:
    """Let TERM and USR1 end a process as Ctrl-C does, with the same exit code, until a run listens for them itself.

    Several processes keep the default, which ends each at once: Python's own handlers run only between two bytecodes,
    and so would wait for a collective to return.
    """
    if place().size == 1:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)


def _tell(line: str, with_traceback: bool, table: str = "") -> None:
    with contextlib.suppress(OSError):  # nobody may read stderr; the exit code still says what happened
        if with_traceback:
            traceback.print_exc()
        print(table + _one_line(line), file=sys.stderr)


def _one_line(text: str) -> str:
    """An error of a plugin may have several lines."""
    return " ".join(text.split("\n"))


def _leave_for_torchrun(line: str, with_traceback: bool) -> None:
    """Give torchrun what it prints of this worker: the line alone, or the stack that ends in it.

    The file is what torch's own `@record` would write, which has the stack in it in any case.
    """
    if not (file := os.environ.get(TORCHRUN_FILE)):
        return
    more = {"timestamp": str(int(time.time()))}
    if with_traceback:
        more["py_callstack"] = traceback.format_exc()
    with contextlib.suppress(OSError):
        told = {"message": {"message": _one_line(line), "extraInfo": more}}
        Path(file).write_text(json.dumps(told), encoding="utf-8")


def _unwritten(refused: OSError) -> ExitCode:
    """The exit code where standard output did not take all that was asked for; a reader that has left wants no more."""
    if isinstance(refused, BrokenPipeError):
        return ExitCode.DONE
    _tell(f"error: standard output could not be written: {refused.strerror}; free some space", False)
    return ExitCode.STORAGE


def _leave(code: int, told: bool) -> None:
    """Exit, at once after an error among several processes: tearing down a gloo group would wait for its peers."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again at its end and exit with 120, so the rest is thrown away here
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code and told and (file := os.environ.get(CODE_FILE)):
        Path(file).write_text(str(int(code)), encoding="ascii")
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
