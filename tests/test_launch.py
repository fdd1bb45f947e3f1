"""The set-up and launch scripts do what their heads say, on real processes and a real pip."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm import free_port

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), REPOSITORY / ".ci" / "run"]
SHORT_RUN = ["--arch", "allcnn_c", "--dataset", "digits", "--steps", "4", "--loader", "memory"]
START_SECONDS = 150  # two agents and two workers import torch on a machine that may be busy


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the interpreter of the tests first on PATH, and one thread a worker."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run([Path(sys.executable).parent / "shellcheck", script], check=True)


def test_many_nodes_names_the_variable_that_is_missing() -> None:
    known = {name: value for name, value in environment(HEAD="127.0.0.1", NNODES="2").items() if name != "NODE_RANK"}
    done = subprocess.run([str(LAUNCH / "many_nodes.sh")], env=known, capture_output=True, text=True)
    assert done.returncode == 2
    assert "NODE_RANK: is 0 on HEAD" in done.stderr


@pytest.mark.slow  # test_two_nodes starts the same by the script for many
@pytest.mark.dist
def test_one_node_trains_with_the_number_of_processes_asked_for(tmp_path: Path) -> None:
    command = [str(LAUNCH / "one_node.sh"), *SHORT_RUN]
    done = subprocess.run(
        command, env=environment(NPROC="2"), cwd=tmp_path, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.dist
def test_two_nodes_meet_and_leave_one_run_directory(tmp_path: Path) -> None:
    shared = {"HEAD": "127.0.0.1", "PORT": str(free_port()), "NNODES": "2", "NPROC": "1"}
    agents = [
        subprocess.Popen(
            [str(LAUNCH / "many_nodes.sh"), *SHORT_RUN],
            env=environment(**shared, NODE_RANK=str(node)),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=START_SECONDS)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # torchrun then ends its workers
            agent.communicate()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert "2 processes" in "".join(outputs)
    assert len(list((tmp_path / "runs").iterdir())) == 1


def interrupted(command: list[str], number: signal.Signals, folder: Path) -> tuple[int, dict[str, object], float]:
    """Start a training, send the launcher a signal once it trains; its exit code, run.json, seconds until its end."""
    process = subprocess.Popen(
        command, env=environment(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "step 10/" in line:
                break
        process.send_signal(number)
        asked = time.monotonic()
        process.communicate(timeout=60)
        seconds = time.monotonic() - asked
    finally:
        process.kill()
        process.communicate()
    (run,) = (folder / "runs").iterdir()
    return process.returncode, json.loads((run / "run.json").read_text()), seconds


LONG_RUN = [*SHORT_RUN[:4], "--loader", "memory", "--epochs", "1000", "--log-interval", "5", "--eval-every", "end"]


@pytest.mark.dist
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.slow),  # the same path with another signal
    ],
)
def test_a_signal_to_torchrun_saves_and_run_json_says_so(tmp_path: Path, number: signal.Signals) -> None:
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "dtrain"]
    code, record, seconds = interrupted([*torchrun, *LONG_RUN], number, tmp_path)
    assert code != 0  # torchrun's own: it turns every code into 1
    assert (record["status"], record["exit_code"]) == ("stopped", 75)
    assert record["last_checkpoint"] == f"step-{record['step']:08d}"
    assert seconds < 20  # torchrun would kill after 30


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_nproc_ends_with_the_exit_code_of_the_run(tmp_path: Path, number: signal.Signals) -> None:
    code, record, _ = interrupted(["dtrain", "train", *LONG_RUN, "--nproc", "2"], number, tmp_path)
    assert code == 75
    assert (record["status"], record["exit_code"]) == ("stopped", 75)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("more", [[], ["--batch-size", "250"]], ids=["as it is", "batch 250"])
def test_a_recipe_starts_on_four_processes_by_torchrun(tmp_path: Path, more: list[str]) -> None:
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=4", "-m", "dtrain"]
    command = [*torchrun, "--arch", "allcnn_c", "--dataset", "digits", "--steps", "2", *more]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert f"batch {'250 = 4 processes x 62 or 63' if more else '64 = 4 processes x 16'}" in done.stdout


@pytest.mark.dist
def test_nproc_tells_an_error_once_and_ends_with_its_code(tmp_path: Path) -> None:
    command = ["dtrain", "train", *SHORT_RUN, "--nproc", "2", "--batch-size", "1"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("--batch-size 1 is too small for 2 processes, each of which needs an image; give at ") == 1


def torchrun(folder: Path, *flags: str) -> str:
    """All that torchrun prints, on both streams, about a run on two processes that ends with an error."""
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "dtrain", *SHORT_RUN, *flags]
    done = subprocess.run(
        command,
        env=environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 1  # torchrun's own: it turns every code into 1
    return done.stdout


WRONG_OPTION = "error: architecture allcnn_c has no option 'nonsense'; choose from: dropout, norm"


@pytest.mark.dist
def test_under_torchrun_an_explained_error_is_one_line_and_debug_adds_the_stack(tmp_path: Path) -> None:
    output = torchrun(tmp_path, "--arch-opt", "nonsense=1")
    own, _, workers = output.partition("ChildFailedError")
    assert own.count(WRONG_OPTION) == 1
    # "traceback" is torchrun's word for what a worker has left, or for the signal by which torchrun ended it
    left = {line for line in workers.splitlines() if "traceback" in line and "(SIGTERM)" not in line}
    assert left == {f"  traceback : {WRONG_OPTION}"}
    assert "exitcode  : 2 " in workers
    sources = str(REPOSITORY / "dtrain")
    assert "Traceback" not in workers
    assert sources not in output
    # the one stack is torchrun's own, which it prints of itself whatever a worker says
    assert own.count("Traceback") == 1

    debug = torchrun(tmp_path, "--arch-opt", "nonsense=1", "--debug")
    own, _, workers = debug.partition("ChildFailedError")
    assert WRONG_OPTION in own
    assert "  traceback : Traceback (most recent call last)" in workers
    assert sources in own
    assert sources in workers


# The smallest build backend: the wheel's metadata are setup.cfg to the letter. So pip is real and needs no network.
BACKEND = """
from pathlib import Path
from zipfile import ZipFile

def build_editable(folder, config_settings=None, metadata_directory=None):
    metadata = Path("setup.cfg").read_text()
    with ZipFile(Path(folder) / "dtrain-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("dtrain-1.dist-info/METADATA", metadata)
        wheel.writestr("dtrain-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("dtrain-1.dist-info/RECORD", "")
    return "dtrain-1-py3-none-any.whl"
"""
METADATA = "Metadata-Version: 2.1\nName: dtrain\nVersion: 1\nProvides-Extra: dev\n"


@pytest.fixture
def bare_checkout(tmp_path: Path) -> Iterator[Path]:
    """A checkout with this set-up script and a package that needs nothing."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "setup_env.sh", tmp_path / "launch")
    (tmp_path / "setup.cfg").write_text(METADATA)
    (tmp_path / "backend.py").write_text(BACKEND)
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tmp_path / "pyproject.toml").write_text(build)
    yield tmp_path
    shutil.rmtree(tmp_path / ".venv", ignore_errors=True)


def set_up(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout's set-up script where neither a compiler nor apt-get is on PATH, and pip has no network."""
    tools = checkout / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("sh", "cat", "dirname", "id", "mv", "rm", "sha256sum", "tr"):
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    known = {"PATH": str(tools), "HOME": str(checkout), "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [checkout / "launch" / "setup_env.sh", *arguments], env=known, capture_output=True, text=True, timeout=120
    )


def summary(checkout: Path) -> str:
    """The one-line description of dtrain in the checkout's environment."""
    program = "from importlib.metadata import metadata; print(metadata('dtrain')['Summary'])"
    command = [str(checkout / ".venv/bin/python"), "-I", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_set_up_is_done_once_and_again_when_setup_cfg_changes(bare_checkout: Path) -> None:
    first = set_up(bare_checkout, "dev")
    assert first.returncode == 0, first.stderr
    assert "to have FFCV, install g++ pkg-config libopencv-dev libturbojpeg0-dev" in first.stderr
    for arguments in (["dev"], []):  # `dev` has all that `make demo` needs
        again = set_up(bare_checkout, *arguments)
        assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    (bare_checkout / "setup.cfg").write_text(METADATA + "Summary: another\n")
    assert set_up(bare_checkout, "dev").returncode == 0
    assert summary(bare_checkout) == "another"


def test_a_set_up_that_fails_is_tried_again(bare_checkout: Path) -> None:
    (bare_checkout / "setup.cfg").write_text(METADATA + "Requires-Dist: no-such-distribution-of-dtrain\n")
    for _ in range(2):
        failed = set_up(bare_checkout)
        assert failed.returncode != 0
        assert "no-such-distribution-of-dtrain" in failed.stderr
