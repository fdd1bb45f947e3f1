"""The entry point of `dtrain` and `python -m dtrain`: the only place that prints errors and sets the exit code."""

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

OF_OUTPUT = (errno.ENOSPC, errno.EPIPE, errno.EIO)  # what writing to standard output may fail with
GROUP_FLAGS = ("--help", "-h", "--version", "--install-completion", "--show-completion")
TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"  # the file from which torchrun reads a worker's error, to print it


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line, then exit with 0 or with an error's exit code. The error is one line on stderr."""
    tune_allocator()  # first, because the settings only affect memory that is allocated later
    _heed_signals()
    if TORCHRUN_FILE in os.environ:
        faulthandler.enable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in GROUP_FLAGS:
        arguments.insert(0, "train")  # a command line that begins with a flag of `train` means the command `train`
    debug = "--debug" in arguments
    code, told = int(ExitCode.DONE), True
    is_run = arguments[:1] == ["train"]  # its results are in files, so training succeeds even if printing fails
    try:
        from dtrain.cli import run

        run(arguments)
        if not is_run:
            sys.stdout.flush()  # now, while a failure can still be reported; the output is the command's result
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
    """Let SIGTERM and SIGUSR1 end a single process as Ctrl-C does, with the same exit code.

    A training run later installs its own handlers. With several processes the signals keep their default, which ends a
    process at once: a Python handler runs only between two bytecodes, so it would wait for a blocking collective.
    """
    if place().size == 1:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler)


def _tell(line: str, with_traceback: bool, table: str = "") -> None:
    with contextlib.suppress(OSError):  # stderr may be closed; the exit code still says what happened
        if with_traceback:
            traceback.print_exc()
        print(table + _one_line(line), file=sys.stderr)


def _one_line(text: str) -> str:
    """Join the lines of an error text, since the text of a plugin's error may have several."""
    return " ".join(text.split("\n"))


def _leave_for_torchrun(line: str, with_traceback: bool) -> None:
    """Write the file from which torchrun prints this worker's error: the line alone, or with its traceback.

    The format is that of torch's `@record` decorator, which always includes the traceback.
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
    """The exit code after standard output could not be written; 0 if its reader, such as `head`, closed the pipe."""
    if isinstance(refused, BrokenPipeError):
        return ExitCode.DONE
    _tell(f"error: standard output could not be written: {refused.strerror}; free some space", False)
    return ExitCode.STORAGE


def _leave(code: int, told: bool) -> None:
    """Flush the output and exit.

    After an error in a run of several processes Python's clean-up is skipped, because closing a gloo process group
    would wait for the other processes. told: whether this process prints the error of the run; it then also leaves the
    exit code for `dtrain train --nproc`.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would flush again at exit, fail and exit with 120, so the unwritten rest is discarded
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code and told and (file := os.environ.get(CODE_FILE)):
        with contextlib.suppress(OSError):  # a full disk: the launcher then gives its own code
            Path(file).write_text(str(int(code)), encoding="ascii")
    if code and os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
