"""What a benchmark measures runs in a process of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from dtrain.errors import ProofError


def output_of(command: list[str], *, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints, run in `folder` with `environment` (default: as here). ProofError if it ends badly."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise ProofError(f"{' '.join(command[1:4])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout
