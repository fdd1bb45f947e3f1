"""Claims about how processes meet: what one run left behind under a launcher is nothing to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Warm, free_port

HERE = Path(__file__).parent


def three_runs(folder: Path, cache: Path) -> list[str]:
    """How three runs end that one process begins in a row: before there is a group, in the middle, and well."""
    from dtrain.errors import DtrainError
    from dtrain.settings.config import TrainConfig
    from dtrain.training import train

    ended = []
    for name, more in {"refused": {"arch_opt": ["nonsense=1"]}, "first": {}, "second": {}}.items():
        flags = {"arch": f"{HERE / 'small_network.py'}:small", "recipe": "none", "dataset": "digits", **more}
        own = {"steps": 2, "threads": 1, "loader": "memory", "cache_dir": cache, "output": folder / name}
        try:
            ended.append(train(TrainConfig.of(**flags, **own)).status)
        except DtrainError as error:
            ended.append(str(error).partition("; ")[0])
    return ended


EXPECTED = [f"architecture {HERE / 'small_network.py'}:small has no option 'nonsense'", "finished", "finished"]


def meetings() -> list[str]:
    """One process alone meets, joins, meets again, parts, and meets once more: the keys in its store, or the error."""
    from dtrain import rendezvous
    from dtrain.errors import ProcessError

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    told = []
    first = rendezvous.meet(0, 1, range(1), 20.0)
    first.join("gloo")
    first.witness.tell(ValueError("of the first"))
    try:
        rendezvous.meet(0, 1, range(1), 20.0)
    except ProcessError as error:
        told.append(str(error))
    first.part()
    second = rendezvous.meet(0, 1, range(1), 20.0)
    told.append(second.witness._read("error") or "no error")
    second.part()
    return told


def test_a_second_meeting_has_keys_of_its_own_and_waits_for_the_groups_of_the_first_to_end(ranks: Warm) -> None:
    (told,) = ranks.call("test_rendezvous:meetings", 1, {})
    assert told == [
        "an earlier run of this process has failed while it trained; begin the next in another",
        "no error",
    ]


@pytest.mark.dist
def test_a_run_after_one_that_was_refused_sees_nothing_of_it(ranks: Warm, tmp_path: Path) -> None:
    assert ranks.call("test_rendezvous:three_runs", 2, {"folder": tmp_path, "cache": tmp_path}) == [EXPECTED, EXPECTED]


@pytest.mark.slow
@pytest.mark.dist
def test_a_script_that_trains_several_times_under_torchrun_begins_each_run_anew(tmp_path: Path) -> None:
    script = tmp_path / "several.py"
    script.write_text(
        f"""import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from test_rendezvous import three_runs
folder = Path({str(tmp_path)!r})
sys.stdout.write(str(three_runs(folder, folder)) + "\\n")  # at once: the lines of two processes do not mix
"""
    )
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(EXPECTED)) == 2, done.stdout
