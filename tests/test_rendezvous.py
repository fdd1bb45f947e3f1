"""Claims about how processes meet: what one run left behind under a launcher is nothing to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Warm

HERE = Path(__file__).parent


def three_runs(folder: Path, cache: Path) -> list[str]:
    """How three runs end that one process begins in a row: before there is a group, in the middle, and well."""
    from dtrain.errors import DtrainError
    from dtrain.settings.config import TrainConfig
    from dtrain.training import train

    ended = []
    for name, more in {
        "refused": {"arch_opt": ["nonsense=1"]},
        "broken": {"arch": f"{HERE / 'faulty_networks.py'}:raises", "recipe": "none"},
        "sound": {},
    }.items():
        flags = {
            "arch": "allcnn_c",
            "dataset": "digits",
            "steps": 4,
            "threads": 1,
            "loader": "memory",
            "dist_timeout": 30,
            **more,
        }
        try:
            ended.append(train(TrainConfig.of(**flags, cache_dir=cache, output=folder / name)).status)
        except DtrainError as error:
            ended.append(str(error))
        except ValueError as error:
            ended.append(f"ValueError: {error}")
    return ended


EXPECTED = [
    "architecture allcnn_c has no option 'nonsense'; choose from: dropout, norm",
    "ValueError: this network has had enough",
    "finished",
]


@pytest.mark.dist
def test_a_run_after_one_that_failed_sees_nothing_of_it(ranks: Warm, tmp_path: Path) -> None:
    assert ranks.call("test_rendezvous:three_runs", 2, {"folder": tmp_path, "cache": tmp_path}) == [EXPECTED, EXPECTED]


@pytest.mark.dist
def test_a_script_that_trains_several_times_under_torchrun_begins_each_run_anew(tmp_path: Path) -> None:
    script = tmp_path / "several.py"
    script.write_text(
        f"""import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from test_rendezvous import three_runs
folder = Path({str(tmp_path)!r})
print("ended:", three_runs(folder, folder), flush=True)
"""
    )
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"ended: {EXPECTED}") == 2, done.stdout
