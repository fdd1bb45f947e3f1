"""The pool of warm processes keeps its promises (a room of the tests, so its tests stand with the others)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import Warm, free_port


def sum_over_ranks() -> tuple[int, int, bool]:
    """In a rank: the sum of 1 << rank over all, by a collective and by two OpenMP threads."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(2)
    one = torch.tensor([1 << dist.get_rank()])
    dist.all_reduce(one)
    dist.destroy_process_group()
    return int(one), int(torch.ones(1 << 20).sum()), "RANK" in os.environ


def sleep_with_a_child(seconds: float) -> None:
    """In a rank: start a process in a session of its own, tell its number, and sleep."""
    child = subprocess.Popen(["sleep", str(seconds)], start_new_session=True)
    print(child.pid, flush=True)
    time.sleep(seconds)


def leave(code: int) -> None:
    """In a rank: end with an exit code."""
    print("before", file=sys.stderr)
    sys.exit(code)


def lives(pid: int) -> bool:
    """Whether a process of this number exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_forked_ranks_meet_over_gloo_and_may_use_several_threads(ranks: Warm) -> None:
    assert ranks.call("test_warm:sum_over_ranks", world=2) == [(3, 1 << 20, True)] * 2


def test_a_plain_process_has_no_rank(ranks: Warm) -> None:
    assert ranks.call("os:getenv", world=1, kwargs={"key": "RANK"}) == [None]


def test_a_rank_sees_the_environment_and_folder_of_the_test(
    ranks: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THE_TEST", "1")
    assert ranks.call("os:getcwd", world=1) == [str(tmp_path)]
    assert ranks.call("os:getenv", world=1, kwargs={"key": "OF_THE_TEST"}) == ["1"]
    assert ranks.call("os:getenv", world=1, kwargs={"key": "OF_THE_CALL"}, env={"OF_THE_CALL": "2"}) == ["2"]


def test_exit_codes_and_streams_come_back(ranks: Warm) -> None:
    (result,) = ranks.start_call("test_warm:leave", world=1, kwargs={"code": 75}).wait()
    assert (result.code, result.out, result.err) == (75, "", "before\n")


@pytest.mark.dist
def test_forked_ranks_train_together(ranks: Warm, tmp_path: Path) -> None:
    short = [
        "--arch",
        "allcnn_c",
        "--dataset",
        "digits",
        "--steps",
        1,
        "--loader",
        "memory",
        "--output",
        tmp_path / "run",
    ]
    first, second = ranks(short, world=2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 processes" in first.out
    assert second.out == ""


def test_a_single_rank_can_be_killed(ranks: Warm) -> None:
    job = ranks.start_call("test_warm:sleep_with_a_child", world=2, kwargs={"seconds": 60})
    job.send_signal(signal.SIGKILL, rank=1)
    while job.codes()[1] is None:
        time.sleep(0.01)
    assert job.codes() == [None, -signal.SIGKILL]


def test_waiting_for_a_line_ends_with_the_rank(ranks: Warm) -> None:
    job = ranks.start_call("test_warm:leave", world=1, kwargs={"code": 3})
    with pytest.raises(AssertionError, match="rank 0, exit code 3\nbefore"):
        job.wait_for("never written")


def test_a_rank_that_hangs_shows_where(ranks: Warm) -> None:
    job = ranks.start_call("test_warm:sleep_with_a_child", world=1, kwargs={"seconds": 60})
    job.wait_for("\n")
    with pytest.raises(AssertionError, match="in sleep_with_a_child"):
        job.wait(timeout=0.1)


def test_nothing_outlives_the_parent(tmp_path: Path) -> None:
    with contextlib.closing(Warm(tmp_path)) as parent:
        job = parent.start_call("test_warm:sleep_with_a_child", world=1, kwargs={"seconds": 60})
        job.wait_for("\n")
        rank, child = job.pids[0], int(job.out())
        assert lives(rank)
        assert lives(child)
    assert not lives(rank)
    assert not lives(child)


def test_a_free_port_can_be_bound_again() -> None:
    assert 1024 < free_port() < 65536
