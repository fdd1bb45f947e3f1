"""`dtrain prove`: dtrain's promises, shown on the user's own run.

Real runs of the command line in processes of their own, in a folder that is thrown away: stopped by signals, killed
with -9, and compared by digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import ProofError, UsageError
from dtrain.files import canonical_json
from dtrain.run import checkpoint
from dtrain.run.rundir import comparable, read_record, read_rows

POLL_SECONDS = 0.02
PARTS = ("network", "optimizer", "ema")


def _command(flags: Sequence[str], output: Path) -> list[str]:
    own = ["--output", str(output), "--resume", "auto", "--checkpoint-every", "2steps"]
    return [sys.executable, "-m", "dtrain", "train", *flags, *own]


def _run(flags: Sequence[str], output: Path) -> None:
    done = subprocess.run(_command(flags, output), capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"the run to be proven ends with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")


def _step_of(output: Path) -> int:
    with contextlib.suppress(Exception):  # the file is being replaced, or is not there yet
        record = read_record(output)
        return record.step if record is not None else 0
    return 0


def _interrupt_at(flags: Sequence[str], output: Path, step: int, how: signal.Signals) -> int:
    """Start the run and send it `how` once it has saved a step at or past `step`; returns the exit code."""
    process = subprocess.Popen(
        _command(flags, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and _step_of(output) < step:
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        if how is signal.SIGKILL:  # the launcher's workers too: they are of its session
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(how)
    return process.wait()


def digests(output: Path) -> dict[str, str]:
    """What two equal runs have equal: SHA-256 of each part of the last checkpoint and of the train and eval rows."""
    found = checkpoint.find(output / "checkpoints").path
    if found is None:
        raise ProofError(f"{output}: the run left no sound checkpoint")
    saved = checkpoint.load(found)
    parts = {name: checkpoint.digest(saved.parts[name]) for name in PARTS if name in saved.parts}
    rows = hashlib.sha256(canonical_json(comparable(read_rows(output)))).hexdigest()
    return {"step": str(saved.step), **parts, "rows": rows}


def prove_resume(flags: Sequence[str], *, stops: int) -> dict[str, Any]:
    """Straight against stopped: the run of `flags` once unbroken, once interrupted `stops` times at random steps.

    Every second interruption is SIGKILL, the others SIGTERM. Raises ProofError naming the first differing tensor.
    """
    with tempfile.TemporaryDirectory(prefix="dtrain-prove-") as folder:
        straight, broken = Path(folder) / "straight", Path(folder) / "stopped"
        _run(flags, straight)
        total = _step_of(straight)
        steps = sorted(random.SystemRandom().sample(range(1, max(2, total)), min(stops, max(1, total - 1))))
        history = []
        for number, step in enumerate(steps):
            how = signal.SIGKILL if number % 2 else signal.SIGTERM
            code = _interrupt_at(flags, broken, step, how)
            history.append({"asked_at_step": step, "by": how.name, "exit_code": code})
        _run(flags, broken)
        rows = [
            {"part": name, "straight": value, "stopped": digests(broken)[name], "equal": digests(broken)[name] == value}
            for name, value in digests(straight).items()
        ]
        if not all(row["equal"] for row in rows):
            raise ProofError(f"stopped at {history}: {_first_difference(straight, broken)}")
        return {"proof": "resume", "interruptions": history, "rows": rows}


def _first_difference(a: Path, b: Path) -> str:
    saved = [checkpoint.find(path / "checkpoints").path for path in (a, b)]
    if None not in saved:
        left, right = (checkpoint.load(path) for path in saved if path is not None)
        for part in PARTS:
            difference = checkpoint.first_difference(left.parts.get(part, {}), right.parts.get(part, {}))
            if difference is not None:
                return f"{part}: {difference}"
    rows = [comparable(read_rows(path)) for path in (a, b)]
    for one, other in zip(*rows, strict=False):
        if one != other:
            return f"row {one} is {other}"
    return "one run has more rows than the other"


def prove_ranks(flags: Sequence[str], *, worlds: Sequence[int]) -> dict[str, Any]:
    """The run of `flags` in every world size: the same samples, draws and schedule; how far weights drift.

    Samples and draws are functions of (seed, step) and are compared as the digest of every step's global batch and
    decisions as each world's shares put them together; rates and counts of images by the rows. Raises ProofError.
    """
    from dtrain.config import TrainConfig
    from dtrain.data.augment import Augmentation, decide
    from dtrain.plan import make_plan

    with tempfile.TemporaryDirectory(prefix="dtrain-prove-") as folder:
        rows: list[dict[str, Any]] = []
        for world in worlds:
            output = Path(folder) / f"world-{world}"
            _run([*flags, "--nproc", str(world)], output)
            found = checkpoint.find(output / "checkpoints").path
            if found is None:
                raise ProofError(f"{output}: the run left no sound checkpoint")
            saved = checkpoint.load(found)
            config = TrainConfig.stored(saved.about["config"])
            train_size = int(saved.about["train_size"])
            plan = make_plan(config, train_size=train_size, world_size=world)
            augmentation = Augmentation(config.seed, config.flip, config.shift, config.cutout)
            seen = hashlib.sha256()
            for step in range(plan.total_steps):
                for rank in range(world):
                    share = plan.share_of(step, rank)
                    seen.update(share.tobytes())
                    seen.update(decide(augmentation, plan.epoch_at(step), share, saved.about["image_size"]).tobytes())
            told = read_rows(output)
            rates = [[row["step"], row["lr"], row["samples"]] for row in told if row["kind"] == "train"]
            counts = [[row["step"], row["images"]] for row in told if row["kind"] == "eval"]
            rows.append(
                {
                    "world": world,
                    "samples_and_draws": seen.hexdigest(),
                    "schedule": hashlib.sha256(canonical_json([rates, counts])).hexdigest(),
                    "network": saved.parts["network"],
                }
            )
        first = rows[0]["network"]
        for row in rows:
            network = row.pop("network")
            row["largest_weight_difference"] = max(
                float((network[name].double() - first[name].double()).abs().max()) for name in first
            )
        for what in ("samples_and_draws", "schedule"):
            if len({row[what] for row in rows}) > 1:
                raise ProofError(f"{what} differ between worlds: {[(row['world'], row[what][:12]) for row in rows]}")
        return {"proof": "ranks", "rows": rows}


def report(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a proof: a table of digests, and that they are equal."""
    from dtrain.commands.show import print_table

    rows = [{k: v[:16] if isinstance(v, str) and len(v) == 64 else v for k, v in row.items()} for row in result["rows"]]
    print_table("digests", result["rows"] if as_json else rows, as_json=as_json)
    if not as_json:
        for stop in result.get("interruptions", ()):
            print(
                f"interrupted by {stop['by']} at step {stop['asked_at_step']} or later, exit code {stop['exit_code']}"
            )
        print(f"proven: {result['proof']}")
