"""Trackers get every row once, and nothing that happens to them happens to the run. The real packages; no network."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from wandb_server import mute, serving
from warm import REPOSITORY, Warm, run_dtrain

from dtrain.errors import UsageError
from dtrain.run import tracking
from dtrain.run.rows import EvalClock, EvalRow, EventClock, EventRow, TrainClock, TrainRow, as_line, comparable
from dtrain.run.rundir import Record, RunDir, open_run, read_rows
from dtrain.run.trackers import figures, find, position
from dtrain.run.tracking import Tracking, sync
from dtrain.settings.config import TrainConfig

SMALL = f"{Path(__file__).parent / 'small_network.py'}:small"
KEY = "0123456789" * 4


def train_row(step: int) -> TrainRow:
    """Its loss is 1/step, which no other step has."""
    clock = TrainClock(100.0, 0.25, 1.0, 2.0, 3.0, 1_000_000.0 + step)
    return TrainRow(step, step / 10, 8 * step, 1 / step, 0.5, 0.1, 8, 0, 2**62, clock)


def eval_row(step: int, weights: str = "raw") -> EvalRow:
    clock = EvalClock(1.0, 1_000_000.0 + step)
    return EvalRow(step, step / 10, 8 * step, "test", weights, step, 2 * step, 1000, 0.5, 0, clock)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no user's settings, no reports of wandb's own errors to its makers."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def folder(tmp_path: Path, environment: None) -> Iterator[RunDir]:
    """A run directory without rows."""
    with open_run(tmp_path / "run", fresh=False) as run:
        run.write_config(TrainConfig.of(recipe="none", arch="allcnn_c", dataset="digits", lr=0.25).settings())
        run.write_record(Record("running"))
        yield run


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For claims about what arrives, however slow the machine is today."""
    monkeypatch.setattr(tracking, "LIMIT_SECONDS", 100.0)


def session(
    folder: RunDir, names: Sequence[str], rows: Sequence[TrainRow | EvalRow], status: str = "stopped", code: int = 75
) -> list[tuple[str, bool]]:
    """A run as its trackers see it, from its start to its end."""
    following = Tracking(folder.path, names)
    for row in (EventRow("start", 0, clock=EventClock(1.0)), *rows):
        folder.append(row)
        following.row(row)
    folder.write_record(Record(status, exit_code=code))  # type: ignore[arg-type]  # one of the four
    return following.close()


def processes_with(*words: str) -> list[str]:
    """The command lines of live processes that hold one of `words`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().decode().replace("\0", " ")
            found += [line] if any(word in line for word in words) else []
    return found


def wait_for_the_end_of(*words: str) -> None:
    deadline = time.monotonic() + 20
    while left := processes_with(*words):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_positions_grow_over_the_rows_of_a_run() -> None:
    rows = [train_row(1), train_row(2), eval_row(2), eval_row(2, "ema"), train_row(3)]
    assert [position(row) for row in rows] == [3, 6, 7, 8, 9]


def test_figures_are_named_after_what_they_are_of() -> None:
    train = figures(replace(train_row(4), loss=math.nan))
    assert {"train/epoch": 0.4, "train/lr": 0.1, "train/images_per_second": 100.0}.items() <= train.items()
    assert train.keys().isdisjoint({"train/loss", "train/step", "train/checksum", "train/time", "train/kind"})
    expected = {"test_ema/top1_fraction": 0.004, "test_ema/top5_fraction": 0.008, "test_ema/loss": 0.5}
    ema = figures(eval_row(4, "ema"))
    assert expected.items() <= ema.items()
    assert ema.keys().isdisjoint({"test_ema/hits", "test_ema/hits5", "test_ema/images"})


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="tracker 'tensorbord' is not installed; did you mean 'tensorboard'?"):
        find(["csv", "tensorbord"])


def test_a_package_that_is_missing_is_told_with_its_extra(tmp_path: Path) -> None:
    ours = importlib.metadata.distribution("dtrain")
    metadata = tmp_path / "dtrain-0.1.0.dist-info"
    metadata.mkdir()
    requires = "".join(f"Requires-Dist: {line}\n" for line in ours.requires or ())
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dtrain\nVersion: 0.1.0\n{requires}")
    (metadata / "entry_points.txt").write_text(ours.read_text("entry_points.txt") or "")
    code = "from dtrain.run.trackers import find; find(['csv']); find(['csv', 'wandb'])"
    bare = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}  # -S: without site-packages
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=bare)
    told = "tracker wandb needs the package wandb, which is not installed; pip install 'dtrain[wandb]'"
    assert done.stderr.splitlines()[-1] == f"dtrain.errors.PluginError: {told}"


LINES = """
class Lines:
    def __init__(self, folder, about, state, *, live):
        self.file = (folder / "lines.txt").open("a")

    def write(self, row):
        print(row.kind, row.step, file=self.file)

    def close(self, exit_code):
        self.file.close()
"""


def test_a_class_of_four_lines_that_knows_nothing_of_dtrain_gets_every_row_once(
    folder: RunDir, tmp_path: Path, patient: None
) -> None:
    (tmp_path / "mine.py").write_text(LINES)
    name = f"{tmp_path}/mine.py:Lines"
    ((told, short),) = session(folder, [name], [train_row(1), eval_row(1)])
    assert not short
    ((told, short),) = session(folder, [name], [train_row(2)])
    (lines,) = folder.path.glob("trackers/*/lines.txt")
    assert (told, short) == (f"{name}: {lines.parent}", False)
    assert lines.read_text() == "train 1\neval 1\ntrain 2\n"
    folder.close()
    assert sync(folder.path, []) == [{"tracker": name, "where": str(lines.parent), "error": None}]
    assert lines.read_text() == "train 1\neval 1\ntrain 2\n"


def test_a_tracker_that_cannot_be_imported_is_told_at_the_end_and_the_run_goes_on(
    folder: RunDir, tmp_path: Path, patient: None
) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('no licence found')\n")
    ((told, short),) = session(folder, [f"{tmp_path}/mine.py:Lines"], [train_row(1)])
    assert short
    assert "could not be imported: SystemExit: no licence found; nothing is lost: dtrain sync" in told


# -- csv and TensorBoard -----------------------------------------------------------------------------------------------


def table(run: Path, kind: str) -> list[dict[str, str]]:
    with (run / "trackers" / "csv" / f"{kind}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_resume_that_computes_rows_again_adds_none_twice(folder: RunDir, patient: None) -> None:
    names = ["csv", "tensorboard"]
    first = [train_row(10), train_row(20), eval_row(20), train_row(30)]
    told = session(folder, names, first)
    assert [fell_short for _, fell_short in told] == [False, False]
    folder.cut_back(20, evaluated=False)
    told = session(folder, names, [eval_row(20), train_row(30), train_row(40), eval_row(40)], "finished", 0)
    assert [fell_short for _, fell_short in told] == [False, False]
    assert [(int(row["step"]), float(row["loss"])) for row in table(folder.path, "train")] == [
        (10, 1 / 10),
        (20, 1 / 20),
        (30, 1 / 30),
        (40, 1 / 40),
    ]
    assert [(row["step"], row["hits"], row["split"]) for row in table(folder.path, "eval")] == [
        ("20", "20", "test"),
        ("40", "40", "test"),
    ]
    curve = scalars(folder.path, "train/loss")
    assert [step for step, _ in curve] == [10, 20, 30, 40]
    assert all(math.isclose(value, 1 / step, rel_tol=1e-6) for step, value in curve)
    assert [step for step, _ in scalars(folder.path, "test/top1_fraction")] == [20, 40]


def test_what_a_killed_tracker_wrote_is_not_seen_twice(folder: RunDir, patient: None) -> None:
    following = Tracking(folder.path, ["tensorboard"])
    for row in [train_row(1), train_row(2), train_row(3)]:
        folder.append(row)
        following.row(row)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1000 for path in folder.path.glob("trackers/tensorboard/events*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for follower in following._followers.values():
        follower.kill()
    ((line, fell_short),) = following.close()
    assert fell_short
    assert "ended with -9" in line
    assert f"dtrain sync {folder.path}" in line
    session(folder, ["tensorboard"], [train_row(4)])
    assert [step for step, _ in scalars(folder.path, "train/loss")] == [1, 2, 3, 4]


# -- wandb -------------------------------------------------------------------------------------------------------------


def test_without_a_key_wandb_works_offline_and_its_folder_holds_every_row(
    folder: RunDir, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((line, fell_short),) = session(folder, ["wandb"], [train_row(10), train_row(20), eval_row(20)], "finished", 0)
    assert fell_short
    assert "wandb: it works offline: No API key configured" in line
    assert line.endswith(f"dtrain sync {folder.path} sends the missing rows")
    (offline,) = (folder.path / "trackers" / "wandb").glob("offline-run-*")
    with serving() as server:
        env = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.base_url}
        sent = subprocess.run([sys.executable, "-m", "wandb", "sync", offline], capture_output=True, text=True, env=env)
        assert sent.returncode == 0, sent.stderr
        ((name, run),) = server.runs.items()
    assert json.loads((folder.path / "trackers" / "wandb" / "state.json").read_text())["id"] == name
    assert [(row["step"], row.get("train/loss"), row.get("test/top1_fraction")) for row in run["history"]] == [
        (10, 0.1, None),
        (20, 0.05, None),
        (20, None, 0.02),
    ]
    assert [row["_timestamp"] for row in run["history"]] == [1_000_010.0, 1_000_020.0, 1_000_020.0]
    assert (run["config"]["lr"], run["config"]["arch"], run["project"]) == (0.25, "allcnn_c", "dtrain")


def test_refused_by_its_server_wandb_works_offline(
    folder: RunDir, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(refuses=True) as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.base_url)
        ((line, fell_short),) = session(folder, ["wandb"], [train_row(10)])
    assert fell_short
    assert re.match("wandb: it works offline: .*403", line)
    assert len(list(folder.path.glob("trackers/wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
def test_a_curve_goes_on_under_its_id_and_sync_fills_in_what_was_missed(
    folder: RunDir, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.base_url)
        monkeypatch.setenv("WANDB_PROJECT", "birds")
        ((line, fell_short),) = session(folder, ["wandb"], [train_row(10), train_row(20), train_row(30)])
        (name,) = server.runs
        run = server.runs[name]
        assert (line, fell_short) == (f"wandb: {server.base_url}/me/birds/runs/{name}", False)
        assert [row["step"] for row in run["history"]] == [10, 20, 30]
        assert (run["config"]["lr"], run["preempting"], run["exit_code"]) == (0.25, True, 75)
        # goes back to 20, offline
        folder.cut_back(20, evaluated=False)
        monkeypatch.setenv("WANDB_MODE", "offline")
        ((_, fell_short),) = session(folder, ["wandb"], [eval_row(20), train_row(30), train_row(40)], "finished", 0)
        assert fell_short
        monkeypatch.delenv("WANDB_MODE")
        folder.close()
        for _ in range(2):  # the second time there is nothing to send
            assert sync(folder.path, []) == [
                {"tracker": "wandb", "where": f"{server.base_url}/me/birds/runs/{name}", "error": None}
            ]
        assert list(server.runs) == [name]
        assert [row["step"] for row in run["history"]] == [10, 20, 30, 40]
        assert run["exit_code"] == 0


# -- never in the way --------------------------------------------------------------------------------------------------


def test_what_hangs_holds_up_the_end_of_a_run_for_less_than_five_seconds_in_all(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mute() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        spent = -time.monotonic()
        following = Tracking(folder.path, ["wandb", "csv"])
        spent += time.monotonic()
        wandb = following._followers["wandb"].pid
        following._followers["csv"].send_signal(signal.SIGSTOP)
        for step in range(1, 100_000):  # more bells than a pipe holds
            row = train_row(step)
            if step < 10:
                folder.append(row)
            spent -= time.monotonic()
            following.row(row)
            spent += time.monotonic()
        spent -= time.monotonic()
        told = following.close()
        spent += time.monotonic()
    assert spent < 5
    assert [line.split(";")[0] for line, _ in told] == [
        "wandb: did not end within 3 s",
        "csv: did not end within 3 s",
    ]
    assert processes_with(str(folder.path)) == []
    wait_for_the_end_of(f"--pid {wandb} ")  # wandb's own service, which looks for the process that started it


@pytest.mark.dist
def test_a_run_with_a_server_that_never_answers_is_the_run_without(ranks: Warm, tmp_path: Path) -> None:
    own = ["--arch", SMALL, "--dataset", "digits", "--recipe", "none", "--loader", "memory", "--threads", 1]
    flags = [*own, "--cache-dir", tmp_path / "cache", "--steps", 6, "--log-interval", 2, "--batch-size", 100]
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    assert [result.code for result in ranks([*flags, "--output", plain])] == [0, 0]
    with mute() as url:
        env = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
        argv = [str(flag) for flag in (*flags, "--output", tracked, "--track", "wandb,csv")]
        results = ranks.start_call("test_trackers:in_a_hurry", 2, {"argv": argv}, env=env).wait()
    assert [result.code for result in results] == [0, 0], results[0].err
    assert results[0].err.count(f"warning: wandb: did not end within 2 s; nothing is lost: dtrain sync {tracked}") == 1
    assert results[1].err == ""
    rows = read_rows(tracked)
    assert comparable(rows) == comparable(read_rows(plain))
    assert [row.step for row in rows if isinstance(row, TrainRow)] == [2, 4, 6]
    assert [row["step"] for row in table(tracked, "train")] == ["2", "4", "6"]
    weights = [next(run.glob("checkpoints/step-00000006/network.safetensors")).read_bytes() for run in (plain, tracked)]
    assert weights[0] == weights[1]


def in_a_hurry(argv: list[str]) -> None:
    """dtrain, which gives its trackers two seconds."""
    tracking.LIMIT_SECONDS = 2.0
    run_dtrain(argv)


def test_a_full_disk_and_a_folder_that_cannot_be_made_end_the_tracker_alone(folder: RunDir, patient: None) -> None:
    full = folder.path / "trackers" / "csv" / "train.csv"
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    (folder.path / "trackers" / "tensorboard").write_text("in the way")
    told = dict(zip(("csv", "tensorboard"), session(folder, ["csv", "tensorboard"], [train_row(1)]), strict=True))
    assert told["csv"][0].startswith("csv: [Errno 28] No space left on device; nothing is lost: ")
    assert told["tensorboard"][0].startswith("tensorboard: cannot be started: File exists; nothing is lost: ")
    assert [row.step for row in read_rows(folder.path)] == [0, 1]


def test_a_tracker_outlives_a_killed_run_only_to_finish(folder: RunDir, ranks: Warm) -> None:
    (result,) = ranks.start_call("test_trackers:dies", 1, {"run": folder.path}).wait()
    assert result.code == -signal.SIGKILL
    wait_for_the_end_of(str(folder.path))
    assert [row["step"] for row in table(folder.path, "train")] == ["1"]


def dies(run: Path) -> None:
    following = Tracking(run, ["csv"])
    row = train_row(1)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(as_line(row))
    following.row(row)
    os.kill(os.getpid(), signal.SIGKILL)


# -- afterwards --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_never_tracked_is_synced_on_request(folder: RunDir, ranks: Warm) -> None:
    for row in [train_row(1), eval_row(1), train_row(2)]:
        folder.append(row)
    (running,) = ranks(["sync", folder.path, "--track", "csv"], world=1)
    assert running.code == 2
    assert running.err == f"error: {folder.path} is still running; sync it when it has ended\n"
    folder.close()
    (nowhere,) = ranks(["sync", folder.path], world=1)
    assert nowhere.code == 2
    assert nowhere.err == f"error: {folder.path} was not tracked; name a tracker: --track wandb\n"
    (done,) = ranks(["sync", folder.path, "--track", "csv", "--json"], world=1)
    assert done.code == 0, done.err
    where = str(folder.path / "trackers" / "csv")
    assert json.loads(done.out) == [{"tracker": "csv", "where": where, "error": None}]
    assert [row["step"] for row in table(folder.path, "train")] == ["1", "2"]
    (missing,) = ranks(["sync", folder.path.parent / "no"], world=1)
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    (folder.path / "trackers" / "csv" / "train.csv").unlink()
    (folder.path / "trackers" / "csv" / "train.csv").symlink_to("/dev/full")
    (full,) = ranks(["sync", folder.path], world=1)
    assert full.code == 6
    assert full.err.endswith("error: csv: [Errno 28] No space left on device; nothing is lost: run it again\n")
