"""Claims about the run directory: one owner, records that appear whole, rows that can be compared and cut back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dtrain.errors import StorageError, UsageError
from dtrain.run import rundir
from dtrain.run.rows import EvalClock, EvalRow, EventClock, EventRow, TrainClock, TrainRow, as_line, comparable
from dtrain.run.rundir import Record, RunDir, open_run


def train(step: int, loss: float | None = None, time: float | None = None) -> TrainRow:
    loss = 1.0 / step if loss is None else loss
    clock = TrainClock(100.0, 0.25, 1.0, 2.0, 3.0, 100.0 + step if time is None else time)
    return TrainRow(step, step / 10, 8 * step, loss, 0.5, 0.1, 8, 0, 2**40, clock)


def evaluation(step: int, hits: int) -> EvalRow:
    return EvalRow(step, step / 10, 8 * step, "test", "raw", hits, hits, 360, 0.5, 0, EvalClock(1.0, 2.0))


def event(step: int, name: str) -> EventRow:
    return EventRow(name, step, clock=EventClock(1.0))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    with open_run(tmp_path / "net", fresh=False) as run:
        yield run


# -- which directory, and whose --------------------------------------------------------------------------------------


def test_the_same_path_is_the_same_directory(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run(tmp_path / "deep" / "net-digits-00000000", fresh=False) as run:
            assert run.path == tmp_path / "deep" / "net-digits-00000000"
            assert run.checkpoints == run.path / "checkpoints"


def test_fresh_takes_the_next_directory_that_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    paths = []
    for _ in range(3):
        with open_run(tmp_path / "net", fresh=True) as run:
            paths.append(run.path.name)
    assert paths == ["net", "net-2", "net-3"]


def test_a_second_run_in_a_directory_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = open_run(tmp_path / "net", fresh=False)
    with pytest.raises(UsageError, match=r"net is in use by \S+ process \d+; stop that run, or") as refusal:
        open_run(tmp_path / "net", fresh=False)
    assert refusal.value.exit_code == 2
    with open_run(tmp_path / "net", fresh=True) as second:
        assert second.path.name == "net-2"
    first.close()
    open_run(tmp_path / "net", fresh=False).close()


def test_a_killed_owner_frees_its_directory(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from dtrain.run.rundir import open_run
        run = open_run(Path(sys.argv[1]) / "net", fresh=False)
        print("owned", flush=True)
        time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "owned\n"
        with pytest.raises(UsageError, match=f"process {child.pid}"):
            open_run(tmp_path / "net", fresh=False)
        child.kill()
    open_run(tmp_path / "net", fresh=False).close()


def test_a_place_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/net: Not a directory; give another directory"):
        open_run(tmp_path / "file" / "net", fresh=False)
    with pytest.raises(StorageError, match=r"cannot write /dev/full/x: Not a directory"):
        open_run(Path("/dev/full/x"), fresh=True)


# -- config.toml and run.json ----------------------------------------------------------------------------------------


def test_config_toml_holds_the_settings_as_toml_reads_them(run: RunDir) -> None:
    settings = {"arch": "allcnn_c", "lr": 1e-05, "arch_opt": {"norm": 'ba"tch'}, "mean": [0.5, 0.25], "flip": True}
    run.write_config(settings)
    assert tomllib.loads((run.path / "config.toml").read_text()) == settings


def test_the_record_comes_back_and_holds_no_nan(run: RunDir) -> None:
    assert rundir.read_record(run.path) is None
    record = Record("failed", 640, 5, "loss is not finite", "step-00000600", ["dtrain", "--arch", "x"])
    run.write_record(record)
    assert rundir.read_record(run.path) == record
    run.write_record(Record("running", resolved={"loss": float("nan")}))
    assert json.loads((run.path / "run.json").read_text())["resolved"] == {"loss": None}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"status": "flying"}', '{"status": "running", "step": "x"}', "\0"]
)
def test_a_damaged_record_is_a_storage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StorageError, match="is not the record of a run"):
        rundir.read_record(tmp_path)


def test_a_record_of_a_newer_version_is_told_with_the_key_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "finished", "step": 3, "mood": "good"}')
    with pytest.raises(StorageError, match=r"run.json holds 'mood', which this version of dtrain does not know; "):
        rundir.read_record(tmp_path)


def test_environment_and_versions_are_those_of_this_process() -> None:
    assert rundir.environment()["python"] == platform.python_version()
    assert rundir.environment()["processor"]
    assert rundir.versions()["torch"] == str(torch.__version__).split("+")[0]


# -- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_a_row_is_a_line_of_json_without_nan(run: RunDir) -> None:
    run.append(train(1, loss=float("nan")))
    run.append(event(1, "stop"))
    run.sync()
    first, second = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first)["loss"] is None
    assert second == '{"kind":"event","event":"stop","step":1,"clock":{"time":1.0}}'


def test_floats_in_rows_come_back_bit_for_bit(run: RunDir) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2**53 + 2.0, -0.0]
    for value in values:
        run.append(train(1, loss=value))
    losses = [row.loss for row in rundir.read_rows(run.path) if isinstance(row, TrainRow)]
    assert [loss.hex() for loss in losses] == [value.hex() for value in values]


def test_cutting_back_drops_later_rows_and_keeps_every_event(run: RunDir) -> None:
    rows = [event(0, "start"), train(50), evaluation(50, 9), event(50, "save"), train(100), evaluation(100, 8),
            event(120, "stop")]  # fmt: skip
    for row in rows:
        run.append(row)
    run.cut_back(50)
    assert rundir.read_rows(run.path) == [rows[0], rows[1], rows[2], rows[3], rows[6]]
    run.append(train(100))
    run.cut_back(0)
    assert rundir.read_rows(run.path) == [rows[0], rows[3], rows[6]]


def test_cutting_back_to_a_step_whose_evaluation_is_due_drops_that_evaluation(run: RunDir) -> None:
    rows = [train(50), evaluation(50, 9), train(100), evaluation(100, 8)]
    for row in rows:
        run.append(row)
    run.cut_back(100, evaluated=False)
    assert rundir.read_rows(run.path) == rows[:3]


def test_cutting_back_keeps_what_a_newer_version_wrote(run: RunDir) -> None:
    run.append(train(1))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"gradient","step":1,"norm":2.5}\n')
        file.write('{"kind":"event","event":"save","step":1,"mood":"good","clock":{"time":1.0,"zone":"UTC"}}\n')
    before = (run.path / "metrics.jsonl").read_bytes()
    run.append(train(2))
    assert rundir.read_rows(run.path) == [train(1), event(1, "save"), train(2)]
    run.cut_back(1)
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_cutting_back_where_no_row_was_written_is_fine(run: RunDir) -> None:
    run.cut_back(0)
    assert rundir.read_rows(run.path) == []


def test_a_line_torn_anywhere_is_dropped_and_the_next_row_stands_alone(run: RunDir) -> None:
    run.append(train(1))
    run.append(train(2))
    whole = (run.path / "metrics.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        for zeros in (b"", b"\0" * 9, b"\0\n"):
            (run.path / "metrics.jsonl").write_bytes(whole[:end] + zeros)
            assert rundir.read_rows(run.path) == [train(1)]
            run.cut_back(1)
            run.append(train(2))
            assert (run.path / "metrics.jsonl").read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(as_line(train(1)) + b"rubbish\n" + as_line(train(2)))
    with pytest.raises(StorageError, match=r"line 2 of .*metrics.jsonl is not a row"):
        rundir.read_rows(tmp_path)


def test_a_row_that_the_disk_takes_half_of_is_not_there_at_all(tmp_path: Path) -> None:
    code = """if True:
        import resource, signal, sys
        from pathlib import Path
        from dtrain.errors import StorageError
        from dtrain.run.rows import EventClock, EventRow
        from dtrain.run.rundir import open_run
        run = open_run(Path(sys.argv[1]) / "net", fresh=False)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        for step in (1, 2):
            try:
                run.append(EventRow("stop", step, reason="x" * 10, clock=EventClock(1.0)))
            except StorageError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.append(EventRow("stop", 3, clock=EventClock(1.0)))"""
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    told = f"cannot write {tmp_path}/net/metrics.jsonl: No space left on device"
    assert [line.partition(";")[0] for line in child.stdout.splitlines()] == [told]
    assert [row.step for row in rundir.read_rows(tmp_path / "net")] == [1, 3]


def test_runs_compare_by_their_rows_without_the_clock() -> None:
    one = [event(0, "start"), train(50), evaluation(50, 9), event(50, "finish")]
    two = [train(50, time=7.0), event(20, "resume"), evaluation(50, 9)]
    assert comparable(one) == comparable(two)
    assert comparable(one)[0]["loss"] == 0.02
    assert "clock" not in comparable(one)[0]
    assert comparable(one) != comparable([train(50), evaluation(50, 8)])


# -- what is in runs/ ------------------------------------------------------------------------------------------------


def test_running_is_believed_only_of_a_run_whose_lock_is_held(tmp_path: Path) -> None:
    alive, dead, finished = (open_run(tmp_path / name, fresh=False) for name in ("alive", "dead", "finished"))
    for run in (alive, dead):
        run.write_record(Record("running", 50))
    finished.write_record(Record("finished", 100, 0))
    finished.append(evaluation(50, 200))
    finished.append(evaluation(100, 355))
    dead.close()
    finished.close()
    rows = {row["run"]: row for row in rundir.summaries(tmp_path)}
    alive.close()
    assert {name: (row["status"], row["step"]) for name, row in rows.items()} == {
        "alive": ("running", 50),
        "dead": ("died", 50),
        "finished": ("finished", 100),
    }
    assert rows["finished"] == {
        "run": "finished",
        "status": "finished",
        "step": 100,
        "reason": None,
        "hits": 355,
        "images": 360,
        "split": "test",
        "weights": "raw",
    }
    assert rows["dead"]["hits"] is None


def test_damaged_runs_are_listed_with_the_reason_and_other_folders_are_not(tmp_path: Path) -> None:
    for name in ("broken", "worse", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "readme").write_text("")
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "worse" / "run.json").write_text('{"status": "finished"}')
    (tmp_path / "worse" / "metrics.jsonl").write_bytes(b"rubbish\n" + as_line(train(2)))
    rows = rundir.summaries(tmp_path)
    assert [(row["run"], row["status"]) for row in rows] == [("broken", "damaged"), ("worse", "damaged")]
    assert "run.json is not the record" in rows[0]["reason"]
    assert "line 1 of" in rows[1]["reason"]
    assert rundir.summaries(tmp_path / "nowhere") == []


def test_looking_at_runs_never_keeps_one_from_starting(tmp_path: Path) -> None:
    open_run(tmp_path / "net", fresh=False).close()
    watcher = "import sys; from pathlib import Path; from dtrain.run.rundir import summaries\n"
    watcher += "print(flush=True)\nwhile True: summaries(Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", watcher, str(tmp_path)], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout
            child.stdout.readline()
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                open_run(tmp_path / "net", fresh=False).close()
        finally:
            child.kill()
