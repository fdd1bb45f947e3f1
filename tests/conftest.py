"""What every test may ask for: warm processes, the shared data, a compiler's cache; and what none may leave behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import Warm

THREAD_GRACE_SECONDS = 2.0  # a thread that was told to end may need a moment


def pytest_configure(config: pytest.Config) -> None:
    # set before numba is imported anywhere: kernels are compiled once a checkout, not once a session; for each of
    # pytest-xdist's workers by itself, since numba's index may lose track of two that are saved at once
    cache = Path(str(config.rootpath)) / ".pytest_cache" / "numba"
    os.environ["NUMBA_CACHE_DIR"] = str(cache / os.environ.get("PYTEST_XDIST_WORKER", "gw0"))
    # where there is a GPU, `auto` would take it, and tests that claim something of a CPU would fail
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # torch sets it when an optimizer is first built; here, so that no test is blamed for it
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.with_name("inductor")))


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """The parent of all ranks, started when the first test needs it."""
    parent = Warm(tmp_path_factory.mktemp("ranks"))
    yield parent
    parent.close()


@pytest.fixture
def ranks(warm: Warm) -> Iterator[Warm]:
    """`ranks(argv, world=2)` runs dtrain in forked processes (see warm.py); what outlives the test is killed."""
    yield warm
    warm.end_jobs()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout (`../shared/data`)."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    return folder


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaves a thread running or the environment changed."""
    threads, environment = set(threading.enumerate()), _environment()
    yield
    deadline = time.monotonic() + THREAD_GRACE_SECONDS
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"threads left running: {sorted(thread.name for thread in left)}"
    changed = {name for name, _ in set(environment.items()) ^ set(_environment().items())}
    assert not changed, f"environment variables left changed: {sorted(changed)}"


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
