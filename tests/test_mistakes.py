"""What people get wrong, and what goes wrong around them: one clear line, the right exit code, soon, nothing lost.

Each line says what was asked, what was found and what to do. Others of the kind stand where they belong: wrong words
of the command line in test_cli, ranges in test_config, pictures in test_sources, damaged betons in test_beton; a second
run in a directory, unequal weights and parameters without gradient in test_training; losses in test_nonfinite.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from warm import Result, Warm, run_dtrain

from dtrain.run.console import three_ways
from dtrain.run.rows import TrainRow
from dtrain.run.rundir import read_record, read_rows
from dtrain.settings.config import TrainConfig

HERE = Path(__file__).parent
SMALL = f"{HERE / 'small_network.py'}:small"
FAULTY = f"{HERE / 'faulty_networks.py'}"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Run:
    """`dtrain train` of a small network on digits; later flags win over earlier ones."""

    def __init__(self, ranks: Warm, folder: Path, cache: Path) -> None:
        self._ranks, self.folder, self.path, self._cache = ranks, folder, folder / "run", cache

    def argv(self, *flags: object) -> list[object]:
        own = ["--arch", SMALL, "--dataset", "digits", "--recipe", "none", "--loader", "memory", "--threads", 1]
        own += ["--steps", 4, "--data-dir", self.folder, "--cache-dir", self._cache, "--output", self.path]
        return [*own, "--eval-every", "end", *flags]

    def go(self, *flags: object, world: int = 1) -> list[Result]:
        return self._ranks(self.argv(*flags), world=world)

    def start(self, *flags: object, world: int = 1) -> Any:
        return self._ranks.start(self.argv(*flags), world=world)

    def refused(self, code: int, *flags: object, world: int = 1) -> str:
        """The one line that all processes together say; they all end with `code`."""
        results = self.go(*flags, world=world)
        return the_line(results, code)


def the_line(results: list[Result], code: int) -> str:
    assert [result.code for result in results] == [code] * len(results), results
    said = [result.err for result in results if result.err]
    assert len(said) == 1, results
    (told,) = said
    assert told.count("\n") == 1, told
    assert told.startswith("error: ")
    return told


@pytest.fixture
def run(ranks: Warm, tmp_path: Path, cache: Path) -> Run:
    return Run(ranks, tmp_path, cache)


def pictures(folder: Path, classes: dict[str, int], size: int = 32) -> Path:
    for split, name in ((split, name) for split in ("train", "test") for name in classes):
        (folder / split / name).mkdir(parents=True)
        for number in range(classes[name]):
            Image.new("RGB", (size, size), (9 * number,) * 3).save(folder / split / name / f"{number}.png")
    return folder


# -- before the work ---------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize(
    ("flags", "world", "code", "words"),
    [
        ("--arch alcnn_c", 2, 2, ["architecture 'alcnn_c' is not installed", "did you mean 'allcnn_c'?"]),
        ("--opt sdg", 1, 2, ["optimizer 'sdg' is not installed", "did you mean 'sgd'?"]),
        ("--dataset digts", 1, 2, ["--dataset digts", "did you mean 'digits'?"]),
        ("--config {folder}/a.toml", 1, 2, ["batchsize is not a setting", "did you mean 'batch_size'?"]),
        ("--on-nonfinite skp", 1, 2, ["--on-nonfinite skp: not a choice", "did you mean 'skip'?"]),
        ("--recipe allcnn", 1, 2, ["recipe 'allcnn' is not installed", "did you mean 'allcnn_c'?"]),
        (
            "--batch-size 1",
            2,
            2,
            ["--batch-size 1 is too small for 2 processes", "give at least 2"],
        ),
        ("--batch-size 1440", 1, 2, ["--batch-size 1440 is larger than the training set of 1437", "at most 1437"]),
        ("--dataset {folder}/none", 1, 3, ["{folder}/none: needs images in train/CLASS/", "found 0 in train/"]),
        ("--dataset {folder}/one", 1, 3, ["single class 'a'", "two or more are needed"]),
        ("--dataset {folder}/gone/", 2, 3, ["--dataset {folder}/gone/: no such folder or tar"]),
        ("--cache-dir {folder}/file/cache", 1, 6, ["{folder}/file/cache: Not a directory", "--cache-dir"]),
        ("--output {folder}/file/run", 2, 6, ["cannot write {folder}/file/run: Not a directory", "--output"]),
        ("--device cuda", 2, 2, ["--device cuda: torch sees no CUDA device here", "use --device cpu"]),
        (f"--arch {FAULTY}:gone", 2, 2, ["has no attribute 'gone'"]),
        (f"--arch {FAULTY}:wrong_logits", 2, 2, ["must return logits of shape (2, 10)", "found (2, 11)"]),
        (f"--arch {FAULTY}:counts", 1, 2, ["training changes the buffer seen", "persistent=False", "without that"]),
    ],
)
def test_a_mistake_is_one_line(run: Run, flags: str, world: int, code: int, words: list[str]) -> None:
    (run.folder / "a.toml").write_text("batchsize = 3\n")
    (run.folder / "file").write_text("")
    (run.folder / "none").mkdir()
    (run.folder / "one" / "train" / "a").mkdir(parents=True)
    (run.folder / "one" / "test" / "a").mkdir(parents=True)
    for split in ("train", "test"):
        Image.new("RGB", (8, 8)).save(run.folder / "one" / split / "a" / "0.png")
    line = run.refused(code, *flags.format(folder=run.folder).split(), world=world)
    for word in words:
        assert word.format(folder=run.folder) in line


def test_an_output_that_cannot_be_written_is_told_before_anything_is_converted(run: Run) -> None:
    (run.folder / "file").write_text("")
    run.refused(6, "--output", run.folder / "file" / "run", "--cache-dir", run.folder / "cache", world=2)
    assert not (run.folder / "cache").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--opt adam --momentum 0.9", "--momentum: optimizer adam has no use for it; leave it out"),
        ("--arch-opt with=3", "has no option 'with'"),
        (
            "--batch-size 3 --grad-accum-steps 4",
            "--grad-accum-steps 4: of --batch-size 3 over 1 process",
        ),
        ("--batch-size 47 --mixup 0.2", "--batch-size 47 does not divide into the pairs of --mixup; try 46 or 48"),
    ],
)
def test_what_can_be_known_is_told_before_a_data_set_is_converted(run: Run, flags: str, told: str) -> None:
    line = run.refused(2, *flags.split(), "--cache-dir", run.folder / "new")
    assert told in line
    assert not (run.folder / "new").exists()


def test_images_that_are_too_small_are_told_with_the_smallest_that_are_not(run: Run) -> None:
    data = pictures(run.folder / "tiny", {"dark": 3, "light": 3}, size=4)
    line = run.refused(2, "--arch", f"{FAULTY}:large_images_only", "--dataset", data, "--batch-size", 2)
    assert "fails on 3 x 4 x 4 images" in line
    assert "; the smallest square images that work are 8 x 8: give larger ones" in line  # (8 - 4) // 4 = 1


def test_a_label_out_of_range_is_named_with_its_file(run: Run) -> None:
    from dtrain.data.format import FIELD, HEADER, SAMPLE

    data = pictures(run.folder / "two", {"dark": 3, "light": 3})
    flags = ("--dataset", data, "--batch-size", 2, "--cache-dir", run.folder / "cache")
    assert run.go(*flags)[0].code == 0
    (beton,) = (run.folder / "cache").glob("*/train.beton")
    samples = np.memmap(beton, np.uint8, "r+")[HEADER.itemsize + 2 * FIELD.itemsize :]
    samples[: SAMPLE.itemsize].view(SAMPLE)["label"] = 2
    samples.flush()
    line = run.refused(3, *flags)
    assert line.startswith(f"error: {beton}: holds a label outside 0..1")
    assert "convert the data set again" in line


def test_a_cache_filled_once_is_no_mistake(run: Run) -> None:
    assert run.go("--arch", f"{FAULTY}:counts", "--arch-opt", "goes_on=false")[0].code == 0


# -- a resume that would be another run --------------------------------------------------------------------------------


def test_a_resume_with_other_settings_is_refused_with_what_was_what_is_asked_and_what_is_used(run: Run) -> None:
    assert run.go()[0].code == 0
    before = (run.path / "run.json").read_bytes()
    flags = ("--lr", 0.25, "--batch-size", 64, "--opt", "adam", "--seed", 1, "--log-interval", 7, "--keep", 9)
    (refused,) = run.go(*flags, "--arch", f"{FAULTY}:counts")
    assert refused.code == 2
    *table, line = refused.err.splitlines()
    assert [words.split() for words in table[:1]] == [["setting", "was", "asked", "used"]]
    cells = {words[0]: words[1:] for words in map(str.split, table[1:])}
    assert cells.pop("arch")[2] == "refused"
    assert cells == {
        "lr": ["-", "0.25", "refused"],
        "batch_size": ["128", "64", "refused"],
        "opt": ["sgd", "adam", "refused"],
        "seed": ["0", "1", "refused"],
        "log_interval": ["50", "7", "7"],
        "keep": ["2", "9", "9"],
    }
    assert max(map(len, table)) < 100
    assert line.startswith(f"error: {run.path} holds a run with other settings (arch: was {SMALL}, asked {FAULTY}:")
    assert line.endswith("; and 2 more); give another --output")
    assert (run.path / "run.json").read_bytes() == before


def test_a_resume_with_other_classes_is_refused_with_what_was_and_what_is(run: Run) -> None:
    data = pictures(run.folder / "pictures", {"cat": 4, "dog": 4})
    flags = ("--dataset", data, "--batch-size", 4)
    assert run.go(*flags)[0].code == 0
    for split in ("train", "test"):
        (data / split / "dog").rename(data / split / "wolf")
    (refused,) = run.go(*flags)
    assert refused.code == 3
    *table, line = refused.err.splitlines()
    assert table[1].split() == ["classes", "2,", "dog", "2,", "wolf", "refused"]
    assert "pictures is not the data set that this run began with" in line
    assert read_record(run.path).step == 4  # type: ignore[union-attr]  # it is there


def test_the_table_of_a_resume_is_readable_on_a_terminal() -> None:
    assert three_ways([("lr", 0.1, None, "refused"), ("arch", "x" * 40, "y", "y")]) == (
        "setting  was                             asked  used\n"
        "lr       0.1                             -      refused\n"
        "arch     xxxxxxxxxxxxxxxxxxxxxxxxxxx...  y      y"
    )


# -- memory and processes ----------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_out_of_memory_on_one_process_ends_all_with_the_batch_to_try(run: Run) -> None:
    line = run.refused(2, "--arch", f"{FAULTY}:hungry", "--steps", 50, world=2)
    assert "out of memory with 64 images at a time a process; try --batch-size 64, or --grad-accum-steps 2" in line
    assert "you tried to allocate 4503599627370496 bytes" in line
    assert read_record(run.path).exit_code == 2  # type: ignore[union-attr]


@pytest.mark.dist
def test_a_process_that_is_killed_is_named_at_once(run: Run) -> None:
    job = run.start("--steps", 100_000, "--log-interval", 5, world=2)
    job.wait_for("step 10/")
    job.send_signal(signal.SIGKILL, rank=1)
    started = time.monotonic()
    results = job.wait(20)
    assert time.monotonic() - started < 4
    assert [result.code for result in results] == [4, -signal.SIGKILL]
    # its step is written once a second
    seen = r"seen (at step \d+|before its first step)"
    assert re.match(rf"error: process 1 of 2 \(pid {job.pids[1]}, {seen}\) died without a word; ", results[0].err)
    assert "memory" in results[0].err
    assert results[0].err.endswith("; run the same command again to go on from the last checkpoint\n")
    assert read_record(run.path).exit_code == 4  # type: ignore[union-attr]


def test_the_launcher_says_how_a_process_ended_that_left_no_line() -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from dtrain.commands.launch import _ended

    def told(code: int) -> str:
        failure = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="/none")
        return _ended(ChildFailedError("dtrain", {1: failure}))

    assert told(-9).startswith(
        "process 1 ended with SIGKILL; if nobody killed it, memory ran out: try a smaller --batch"
    )
    assert told(-11).startswith("process 1 ended with SIGSEGV; its own output stands above; run the same command again")
    assert told(3).startswith("process 1 ended with exit code 3; ")


def as_rank(by_rank: list[list[str]], port: int | None = None) -> None:
    """`python -m dtrain` with a command line of its own for each rank, where told at another port."""
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
    run_dtrain(by_rank[int(os.environ["RANK"])])


@pytest.mark.dist
def test_a_port_in_use_is_named_and_nobody_waits_longer_than_the_limit(run: Run, ranks: Warm) -> None:
    with socket.socket() as taken:  # listens and never answers
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = [str(word) for word in run.argv("--dist-timeout", 1)]
        results = ranks.start_call("test_mistakes:as_rank", 2, {"by_rank": [argv, argv], "port": port}).wait(30)
    assert [result.code for result in results] == [4, 4]
    assert results[0].err == (
        f"error: port {port} of this host, where the processes are to meet, is in use; give torchrun another "
        "--master-port (or set another MASTER_PORT), or --standalone\n"
    )
    assert results[1].err == (
        f"error: process 1 of 2 could not meet the others at 127.0.0.1:{port} within 1 s: whatever listens there does "
        "not answer as torch's store does\n"
    )


@pytest.mark.dist
@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--arch", "./gone.py:net"], 2, "could not be imported"),  # before the processes have met
        (["--dataset", "./gone/"], 3, "--dataset ./gone/: no such folder or tar"),
        (["--loader", "ffcv", "--cache-dir", "/dev/null/x"], 6, "the cache /dev/null/x: Not a directory"),
    ],
)
def test_a_mistake_that_one_process_alone_can_see_is_told_by_it_and_ends_all(
    run: Run, ranks: Warm, flags: list[str], code: int, told: str
) -> None:
    argv = [str(word) for word in run.argv("--dist-timeout", 20)]
    started = time.monotonic()
    results = ranks.start_call("test_mistakes:as_rank", 2, {"by_rank": [argv, [*argv, *flags]]}).wait(30)
    assert told in the_line(results, code)
    assert results[0].err == ""
    assert time.monotonic() - started < 15


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_before_a_run_listens_ends_it_with_130(run: Run, number: signal.Signals) -> None:
    job = run.start("--arch", f"{FAULTY}:slow_to_build")
    job.wait_for("building")
    job.send_signal(number)
    (result,) = job.wait(10)
    assert (result.code, result.err) == (130, "stopped before anything could be saved\n")


def test_train_in_a_notebook_leaves_signals_as_they_were(ranks: Warm, run: Run) -> None:
    flags = {"arch": SMALL, "dataset": "digits", "recipe": "none", "threads": 1, "loader": "memory"}
    settings = {**flags, "epochs": 1000, "cache_dir": run._cache, "output": run.path, "log_interval": 5}
    assert ranks.call("test_mistakes:stopped_by_a_signal", 1, {"settings": settings}) == [["on_signal", "on_signal"]]


def stopped_by_a_signal(settings: dict[str, Any]) -> list[str]:
    """Train, with a TERM after some steps; the name of this process's own handler before and after."""
    import threading

    from dtrain import train
    from dtrain.errors import Stopped

    def on_signal(number: int, frame: object) -> None:
        raise AssertionError("the run was to take it")

    signal.signal(signal.SIGTERM, on_signal)
    names = [signal.getsignal(signal.SIGTERM).__name__]  # type: ignore[union-attr]

    def kill() -> None:
        rows = Path(settings["output"]) / "metrics.jsonl"
        while not rows.exists() or '"train"' not in rows.read_text():  # the run listens
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill).start()
    with pytest.raises(Stopped):
        train(TrainConfig.of(**settings))
    return [*names, signal.getsignal(signal.SIGTERM).__name__]  # type: ignore[union-attr]


# -- a disk that fills up ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=600k tmpfs {disk}") != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield disk
    os.system(f"umount {disk}")


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_full_cache_is_one_line(run: Run, small_disk: Path) -> None:
    fill(small_disk / "filler")
    line = run.refused(6, "--cache-dir", small_disk)
    assert str(small_disk) in line
    assert "--cache-dir" in line


def test_rows_that_a_full_disk_refuses_are_written_in_order_when_there_is_room(run: Run, small_disk: Path) -> None:
    run.path = small_disk / "run"
    job = run.start("--steps", 100_000, "--log-interval", 2, "--checkpoint-every", "20steps")
    job.wait_for("step 30/")
    fill(small_disk / "filler")
    job.wait_for("not saved: ")
    (small_disk / "filler").unlink()
    job.send_signal(signal.SIGTERM)
    (result,) = job.wait(20)
    assert result.code == 75, result.err
    assert "No space left on device" in result.err
    rows = [row.step for row in read_rows(run.path) if isinstance(row, TrainRow)]
    assert rows == list(range(2, rows[-1] + 1, 2))
    assert len(rows) >= 15


def test_a_disk_that_stays_full_ends_the_run_with_6_when_it_can_wait_no_longer(run: Run, small_disk: Path) -> None:
    run.path = small_disk / "run"
    job = run.start("--steps", 100_000, "--log-interval", 2, "--checkpoint-every", "20steps")
    job.wait_for("step 30/")
    fill(small_disk / "filler")
    job.wait_for("not saved: ")
    job.send_signal(signal.SIGTERM)
    (result,) = job.wait(20)
    assert result.code == 6, result.err
    *warnings, line = result.err.splitlines()
    assert line.startswith("error: cannot ")
    assert all("not saved: " in warning for warning in warnings)


# -- what was run before -----------------------------------------------------------------------------------------------


def test_a_network_file_that_was_changed_is_told_and_one_that_does_not_fit_is_refused(run: Run) -> None:
    text = (HERE / "small_network.py").read_text()
    file = run.folder / "net.py"
    file.write_text(text)
    flags = ("--arch", f"{file}:small", "--batch-size", 48)
    assert run.go(*flags)[0].code == 0
    file.write_text(text + "\n# a remark\n")
    (changed,) = run.go(*flags)
    assert changed.code == 0, changed.err
    assert re.search(
        r"warning: architecture: was net\.py \w{12}, is net\.py \w{12}; what follows need not", changed.err
    )
    file.write_text(text + WIDER)
    (refused,) = run.go(*flags)
    assert refused.code == 2
    assert "the network is not the one that this run began with (Error(s) in loading" in refused.err.splitlines()[-1]


WIDER = """
before = small


def small(num_classes: int, *, in_channels: int = 3) -> nn.Module:
    return nn.Sequential(before(num_classes, in_channels=in_channels), nn.Linear(num_classes, num_classes))
"""


def test_an_evaluation_that_runs_out_of_memory_is_told_with_its_own_setting(run: Run) -> None:
    line = run.refused(2, "--arch", f"{FAULTY}:hungry_for_many", "--batch-size", 64)
    assert (
        "out of memory in an evaluation of 360 images at a time; try --eval-batch-size 180, which is another run"
        in line
    ), line


def test_a_dataset_that_changed_is_not_evaluated(run: Run) -> None:
    data = pictures(run.folder / "pictures", {"cat": 4, "dog": 4})
    assert run.go("--dataset", data, "--batch-size", 4)[0].code == 0
    (data / "train" / "dog" / "0.png").unlink()
    (refused,) = run._ranks(["eval", run.path], world=1)
    assert refused.code == 3
    assert "is not the data set that this run began with" in refused.err


@pytest.mark.slow
def test_what_is_shown_nowhere_ends_no_run_and_keeps_its_exit_code(run: Run) -> None:
    def code_of(*arguments: object) -> int:
        command = [sys.executable, "-m", "dtrain", *map(str, arguments)]
        with Path("/dev/full").open("w") as full:
            return subprocess.run(command, stdout=full, stderr=full).returncode

    assert code_of("train", *run.argv("--batch-size", 64)) == 0
    assert read_record(run.path).status == "finished"  # type: ignore[union-attr]
    assert code_of("train", *run.argv("--batch-size", 32)) == 2  # with a table of what differs
    assert code_of("runs", run.folder, "--json") == 6  # here the output is what was asked for
