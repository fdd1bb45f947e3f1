"""Runs what a benchmark measures in a process of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from dtrain.errors import ProofError


def output_of(command: list[str], *, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its standard output. Raises ProofError if its exit code is not 0.

    folder, environment: by default those of this process.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise ProofError(f"{' '.join(command[1:4])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout
