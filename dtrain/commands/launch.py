"""`dtrain train --nproc N`: starts the processes by torch's own launcher and keeps the exit code of the run.

torchrun itself turns every exit code into 1.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.errors import ExitCode, ProcessError, UsageError
from dtrain.world import place

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

CODE_FILE = "DTRAIN_EXIT_CODE_FILE"  # names the file where the process that prints an error leaves its exit code


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """The command line of each process: the one given, without --nproc N."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("--nproc="):
            skip = False
        elif argument == "--nproc":
            skip = True
        else:
            kept.append(argument)
    return kept


def _ended(error: ChildFailedError) -> str:
    """The line about the process that ended first, for a run in which no process left a line of its own."""
    rank, failure = error.get_first_failure()
    how, why = f"exit code {failure.exitcode}", "its own output stands above"
    if failure.exitcode < 0:
        how = signal.Signals(-failure.exitcode).name
    if failure.exitcode == -signal.SIGKILL:
        why = "if nobody killed it, memory ran out: try a smaller --batch-size or more --grad-accum-steps"
    return f"process {rank} ended with {how}; {why}; run the same command again to go on from the last checkpoint"


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m dtrain ARGUMENTS` in `nproc` processes of this machine; returns the exit code of the run.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the processes, which then save and end together.
    Raises UsageError under torchrun, and ProcessError if a process ended without leaving an error line.
    """
    if (size := place().size) > 1:
        raise UsageError(f"--nproc {nproc}: torchrun has already started {size} processes; leave it out")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        os.environ[CODE_FILE] = str(file)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
        )
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # dtrain sets its threads itself; without this torch warns
        try:
            elastic_launch(config, sys.executable)("-m", "dtrain", *without_nproc(arguments))
        except (ChildFailedError, SignalException) as error:
            if file.exists():
                return int(file.read_text(encoding="ascii"))
            if isinstance(error, ChildFailedError):
                raise ProcessError(_ended(error)) from None
            return ExitCode.STOPPED_UNSAVED
        finally:
            del os.environ[CODE_FILE]
    return ExitCode.DONE
