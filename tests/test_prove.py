"""`dtrain prove` on real runs: it shows what holds, and it does find what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = [
    "--dataset",
    "digits",
    "--recipe",
    "none",
    "--loader",
    "memory",
    "--batch-size",
    "64",
    "--eval-every",
    "3steps",
]


def prove(what: str, arch: str, steps: int, *flags: str) -> subprocess.CompletedProcess[str]:
    own, cut = list(flags), ["--", "--arch", f"{HERE / arch}", *FLAGS, "--steps", str(steps)]
    command = [sys.executable, "-m", "dtrain", "prove", what, *own, *cut]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_stopped_and_killed_at_random_steps_a_run_ends_with_the_bits_of_the_unbroken_one() -> None:
    done = prove("resume", "small_network.py:small", 60, "--stops", "3", "--json")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert {stop["exit_code"] for stop in proof["interruptions"]} <= {75, -9}
    assert len(proof["interruptions"]) >= 1
    rows = {row["part"]: row for row in proof["rows"]}
    assert rows.keys() == {"step", "network", "optimizer", "rows"}
    assert all(row["straight"] == row["stopped"] for row in rows.values())
    assert rows["step"]["straight"] == "60"


@pytest.mark.slow
def test_a_network_with_a_frozen_batch_norm_is_proven_to_resume_over_evaluations() -> None:
    done = prove("resume", "small_network.py:frozen_norm", 40, "--stops", "3")  # evaluates after every third step
    assert done.returncode == 0, done.stderr
    assert "proven: " in done.stdout


@pytest.mark.slow
def test_a_network_that_draws_what_no_seed_decides_is_found_out_with_7() -> None:
    done = prove("resume", "faulty_networks.py:forgets", 100, "--stops", "3")
    assert done.returncode == 7
    assert "network: " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_any_number_of_processes_sees_the_same_samples_and_counts_the_same() -> None:
    done = prove("ranks", "small_network.py:small", 6, "--worlds", "1,2,3,5", "--json")  # of batches of 64
    assert done.returncode == 0, done.stderr
    one, *others = json.loads(done.stdout)["rows"]
    assert [row["world"] for row in (one, *others)] == [1, 2, 3, 5]
    assert one["loss_differs_from_step"] is None
    for row in others:
        for what in ("samples_and_draws", "schedule", "evaluation", "hits"):
            assert one[what] == row[what]
        assert row["loss_differs_from_step"] is not None  # dropout is drawn by process
        assert row["largest_weight_difference"] > 0


def test_what_cannot_be_run_cannot_be_proven_and_says_why() -> None:
    done = prove("resume", "small_network.py:nothing", 3)
    assert done.returncode == 2
    assert "the run to be proven ends with 2" in done.stderr
    assert "nothing" in done.stderr
