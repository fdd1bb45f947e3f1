"""`dtrain train --nproc N`: starts N processes with torch's elastic launcher, and ends with the run's own exit code.

The torchrun command would end with 1 after every failure.
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

# The environment variable with the path of a file, into which the process that prints an error writes its exit code.
CODE_FILE = "DTRAIN_EXIT_CODE_FILE"


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """The command line for each process: `arguments` without --nproc N."""
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
    """The error message for a run in which a process ended without an explanation; names the one that ended first."""
    rank, failure = error.get_first_failure()
    how, why = f"exit code {failure.exitcode}", "its own output stands above"
    if failure.exitcode < 0:
        how = signal.Signals(-failure.exitcode).name
    if failure.exitcode == -signal.SIGKILL:
        why = "if nobody killed it, memory ran out: try a smaller --batch-size or more --grad-accum-steps"
    return f"process {rank} ended with {how}; {why}; run the same command again to go on from the last checkpoint"


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m dtrain ARGUMENTS` in `nproc` processes on this machine; returns the exit code of the run.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the processes, which then save the same step and end.
    Raises UsageError if torchrun has started several processes already, and ProcessError if a process ended without
    printing an error.
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
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # silences a warning of torch; dtrain sets its threads itself
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
