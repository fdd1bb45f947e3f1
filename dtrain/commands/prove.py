"""`dtrain prove`: checks on a run of the user's that it resumes exactly and does not depend on the number of processes.

It runs real `dtrain train` commands in their own processes and in a temporary folder, stops them by SIGTERM and
SIGKILL, and compares digests of their checkpoints and rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.errors import DtrainError, ExitCode, ProofError, UsageError
from dtrain.files import canonical_json
from dtrain.run import checkpoint
from dtrain.run.rows import comparable
from dtrain.run.rundir import read_record, read_rows

POLL_SECONDS = 0.02
PARTS = ("network", "optimizer", "ema")
LAST_STEPS = 3  # a run is not interrupted in its last steps, since the signal might arrive when it has ended
PROVEN = {
    "resume": "proven: stopped and killed, the run ends with the same bits as the uninterrupted one",
    "ranks": "proven: samples, random draws, schedule and evaluation counts are the same for every number of "
    "processes. Weights may differ by rounding, and by layers that see one process's share at a time, such as batch "
    "norm: the table says from which step on the losses differ, and how far the final weights are apart",
}


def _exact(flags: Sequence[str]) -> list[str]:
    """`flags`, with --deterministic added if the run may use a GPU and the flags do not say.

    Without it, CUDA libraries choose kernels by timing them, so two equal runs may differ.
    """
    import torch

    on_cpu = "--device=cpu" in flags or ("--device", "cpu") in zip(flags, flags[1:], strict=False)
    said = {"--deterministic", "--no-deterministic"} & set(flags)
    return [*flags] if on_cpu or said or not torch.cuda.is_available() else [*flags, "--deterministic"]


def _command(flags: Sequence[str], output: Path) -> list[str]:
    own = ["--output", str(output), "--resume", "auto", "--checkpoint-every", "2steps"]
    return [sys.executable, "-m", "dtrain", "train", *flags, *own]


def _run(flags: Sequence[str], output: Path) -> None:
    done = subprocess.run(_command(flags, output), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        told = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        codes = {int(code): code for code in ExitCode}
        code = codes.get(done.returncode, ExitCode.PROCESS)
        raise DtrainError(f"the run to be proven ends with {done.returncode}: {' '.join(told)}", code)


def _step_of(output: Path) -> int:
    with contextlib.suppress(Exception):  # the run directory may not be there yet
        record = read_record(output)
        return record.step if record is not None else 0
    return 0


def _finished(output: Path) -> bool:
    record = read_record(output)
    return record is not None and record.status == "finished"


def _interrupt_at(flags: Sequence[str], output: Path, step: int, how: signal.Signals) -> int:
    """Start or continue the run, and send it the signal `how` when it has saved `step` or a later one.

    It has to save at least once after this start. Returns the exit code.
    """
    before = _step_of(output)
    process = subprocess.Popen(
        _command(flags, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and _step_of(output) < max(step, before + 1):
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        if how is signal.SIGKILL:
            for pid in (process.pid, *_descendants(process.pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            process.send_signal(how)
    return process.wait()


def _descendants(pid: int) -> list[int]:
    """All processes that `pid` has started, directly or not: a launcher's workers run in sessions of their own."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text(encoding="ascii").split()):
                found += [child, *_descendants(child)]
    return found


def digests(output: Path) -> dict[str, str]:
    """The digests by which two runs are compared: the SHA-256 of each part of the last checkpoint, and of the rows.

    The rows are those of training and evaluation, without their `clock`, which holds times. Also gives the last
    checkpoint's step. Raises ProofError if `output` has no sound checkpoint.
    """
    saved = _load_last(output)
    parts = {name: checkpoint.digest(saved.parts[name]) for name in PARTS if name in saved.parts}
    return {"step": str(saved.step), **parts, "rows": _digest(comparable(read_rows(output)))}


def prove_resume(flags: Sequence[str], *, stops: int) -> dict[str, Any]:
    """Compare an uninterrupted run with the same run interrupted `stops` times, at random steps.

    flags: those of `dtrain train`. The interruptions are SIGTERM and SIGKILL in turn; after each, the same command is
    run again. On CUDA, --deterministic is added unless the flags say otherwise.
    Returns the interruptions and a row for each part that was compared. Raises ProofError, which names the first tensor
    or row that differs, or if the run ended before any interruption; UsageError if the run itself fails.
    """
    if stops < 1:
        raise UsageError(f"--stops {stops}: give a number greater than 0")
    flags = _exact(flags)
    with tempfile.TemporaryDirectory(prefix="dtrain-prove-") as folder:
        straight, broken = Path(folder) / "straight", Path(folder) / "stopped"
        _run(flags, straight)
        total = _step_of(straight)
        possible = range(1, max(2, total - LAST_STEPS + 1))
        steps = sorted(random.SystemRandom().sample(possible, min(stops, len(possible))))
        history = []
        for number, step in enumerate(steps):
            how = signal.SIGKILL if number % 2 else signal.SIGTERM
            code = _interrupt_at(flags, broken, step, how)
            if _finished(broken):  # the run ended before the signal arrived, so this was no interruption
                break
            if code not in (ExitCode.STOPPED, -signal.SIGKILL):
                raise ProofError(f"asked to stop by {how.name} at step {step}, the run ended with {code}")
            history.append({"asked_at_step": step, "by": how.name, "exit_code": code})
        if not history:
            raise ProofError(f"the run of {total} steps ended before it could be interrupted; give it more --steps")
        _run(flags, broken)
        after = digests(broken)
        rows = [
            {"part": name, "straight": value, "stopped": after[name], "equal": after[name] == value}
            for name, value in digests(straight).items()
        ]
        if not all(row["equal"] for row in rows):
            raise ProofError(f"stopped at {history}: {_first_difference(straight, broken)}")
        return {"proof": "resume", "interruptions": history, "rows": rows}


def _first_difference(a: Path, b: Path) -> str:
    left, right = _load_last(a), _load_last(b)
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
    """Compare the same run on different numbers of processes.

    flags: those of `dtrain train`. worlds: the numbers of processes. On CUDA, --deterministic is added unless the flags
    say otherwise.
    Raises ProofError unless these are equal for all: the samples and random draws (each step's checksum, summed over
    the processes), the learning rates, and the evaluation counts for the first run's last checkpoint. The result also
    reports, without a judgement, the first step whose loss differs from the first run's, and the largest difference of
    a final weight.
    """
    flags = _exact(flags)
    with tempfile.TemporaryDirectory(prefix="dtrain-prove-") as folder:
        outputs = {world: Path(folder) / f"world-{world}" for world in worlds}
        for world, output in outputs.items():
            _run([*flags, "--log-interval", "1", "--nproc", str(world)], output)
        one = outputs[worlds[0]]
        common = _load_last(one)
        losses = {world: [r["loss"] for r in _rows(output, "train")] for world, output in outputs.items()}
        rows: list[dict[str, Any]] = []
        for world, output in outputs.items():
            steps = _rows(output, "train")
            again = _evaluate_again(flags, one, Path(folder) / f"evaluated-{world}", world)
            rows.append(
                {
                    "world": world,
                    "samples_and_draws": _digest([[r["step"], r["samples"], r["checksum"]] for r in steps]),
                    "schedule": _digest([[r["step"], r["lr"]] for r in steps]),
                    "evaluation": _digest(again),
                    "hits": " ".join(f"{row['hits']}/{row['images']}" for row in again),
                    "loss_differs_from_step": _first_unequal(losses[worlds[0]], losses[world]),
                    "largest_weight_difference": _distance(common, _load_last(output)),
                }
            )
        for what in ("samples_and_draws", "schedule", "evaluation"):
            if len({row[what] for row in rows}) > 1:
                raise ProofError(f"{what} differ between worlds: {[(row['world'], row[what][:12]) for row in rows]}")
        return {"proof": "ranks", "rows": rows}


def _rows(output: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in comparable(read_rows(output)) if row["kind"] == kind]


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _load_last(output: Path) -> checkpoint.Checkpoint:
    found = checkpoint.find(output / checkpoint.FOLDER).checkpoint
    if found is None:
        raise ProofError(f"{output}: the run left no sound checkpoint")
    return found


def _first_unequal(a: Sequence[float], b: Sequence[float]) -> int | None:
    """The first step, counted from 1, at which two runs' losses differ."""
    return next((step for step, (one, other) in enumerate(zip(a, b, strict=True), start=1) if one != other), None)


def _distance(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> float:
    left, right = a.parts["network"], b.parts["network"]
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def _evaluate_again(flags: Sequence[str], run: Path, output: Path, world: int) -> list[dict[str, Any]]:
    """The evaluation rows that `world` processes write for the last checkpoint of `run`.

    It copies the run into `output`, marks the evaluation in the copied checkpoint as still due, and resumes the copy.
    """
    saved = _load_last(run)
    shutil.copytree(run, output, ignore=shutil.ignore_patterns(checkpoint.FOLDER, "lock", "trackers"))
    (output / checkpoint.FOLDER).mkdir()
    checkpoint.save(
        output / checkpoint.FOLDER,
        saved.step,
        saved.parts,
        {**saved.state, "run": {**saved.state["run"], "eval_due": True, "best": None}},
        saved.about,
    )
    _run([*flags, "--nproc", str(world)], output)
    return [row for row in _rows(output, "eval") if row["step"] == saved.step]


def report(result: dict[str, Any], *, as_json: bool) -> None:
    """Print the result of a proof: a table with the first 16 digits of each digest, interruptions, and a conclusion."""
    from dtrain.commands.show import print_table

    rows = [{k: v[:16] if isinstance(v, str) and len(v) == 64 else v for k, v in row.items()} for row in result["rows"]]
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_table("digests", rows, as_json=False)
        for stop in result.get("interruptions", ()):
            print(
                f"interrupted by {stop['by']} at step {stop['asked_at_step']} or later, exit code {stop['exit_code']}"
            )
        print(PROVEN[result["proof"]])
