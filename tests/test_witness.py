"""Claims about processes that wait for each other: who is late is waited for, who is gone is named."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from warm import Warm


def test_a_death_for_lack_of_memory_is_told_where_the_kernel_tells_it() -> None:
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in __all__

    from dtrain.witness import Witness, _host, killed_for_memory

    gone = subprocess.Popen(["true"])
    gone.wait()
    store = HashStore()
    witness = Witness(store, 0, 2, range(2), 1.0)
    try:
        store.set("where/1", f"{_host()} {gone.pid}")
        store.set("beat/1", "7 9")
        told = str(witness.told_by_another())
        assert told.startswith(f"process 1 of 2 (pid {gone.pid}, seen at step 7) died without a word; ")
        assert "if nobody killed it, memory may have run out" in told
        witness._killed_before = killed_for_memory() - 1  # as if the kernel had killed one since
        assert "this host's kernel has killed a process for lack of memory meanwhile" in str(witness.told_by_another())
    finally:
        witness.beat.stop()


LIMIT = 4.0  # --dist-timeout in seconds


def prepared(late_seconds: float, missing: int = 0) -> str:
    """What comes of it when process 1 takes longer than --dist-timeout, or some never come."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

    from dtrain.world import Place, World, place

    at, store = place(), None
    at = Place(at.rank, at.size + missing, at.rank, at.size + missing)
    if missing:  # torchrun's own store, which waits for nobody
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=True, wait_for_workers=False) if at.is_main else None
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    world = World(at, LIMIT)
    try:
        world.meet()
        world.join("gloo")
        if at.rank == 1:
            print("converts", flush=True)
            time.sleep(late_seconds)
        world.wait_for_all("prepared", 60.0)
    except Exception as error:
        print(told := str(world.explained(error)))
        return told
    world.leave()
    del store
    return "met"


@pytest.mark.slow
@pytest.mark.dist
def test_a_conversion_may_take_longer_than_a_collective_on_one_host(ranks: Warm) -> None:
    assert ranks.call("test_witness:prepared", 2, {"late_seconds": LIMIT + 3}) == ["met", "met"]


@pytest.mark.dist
def test_a_process_that_never_comes_is_named_within_the_limit(ranks: Warm) -> None:
    started = time.monotonic()
    told = ranks.call("test_witness:prepared", 2, {"late_seconds": 0.0, "missing": 1})
    assert time.monotonic() - started < LIMIT + 20  # with two starts on a busy machine
    words = "process 2 (it never came) of 3 did not come within 4 s (--dist-timeout 4); run the same"
    assert all(words in line for line in told), told


@pytest.mark.dist
def test_a_process_that_dies_while_others_wait_for_its_conversion_is_named_at_once(ranks: Warm) -> None:
    job = ranks.start_call("test_witness:prepared", 2, {"late_seconds": 100.0})
    job.wait_for("converts", rank=1)
    job.send_signal(signal.SIGKILL, rank=1)
    results = job.wait(20)
    assert f"process 1 of 2 (pid {job.pids[1]}, seen before its first step) died" in results[0].out
