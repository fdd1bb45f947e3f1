"""A run from outside: what it leaves, how it stops, what it says when something goes wrong. Real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from warm import Result, Warm

HERE = Path(__file__).parent
SMALL = f"{HERE / 'small_network.py'}:small"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Run:
    """`dtrain train` of a small network on digits in a directory of its own."""

    def __init__(self, ranks: Warm, path: Path, cache: Path) -> None:
        self._ranks, self.path, self._cache = ranks, path, cache

    def argv(self, *flags: object, arch: str = SMALL) -> list[object]:
        own = ["--arch", arch, "--dataset", "digits", "--recipe", "none", "--loader", "memory", "--threads", 1]
        return [*own, "--cache-dir", self._cache, "--output", self.path, *flags]

    def go(self, *flags: object, world: int = 1, arch: str = SMALL) -> list[Result]:
        return self._ranks(self.argv(*flags, arch=arch), world=world)

    def start(self, *flags: object, world: int = 1, arch: str = SMALL) -> Any:
        return self._ranks.start(self.argv(*flags, arch=arch), world=world)

    @property
    def record(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "run.json").read_text())
        return content

    def rows(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())


@pytest.fixture
def run(ranks: Warm, tmp_path: Path, cache: Path) -> Run:
    return Run(ranks, tmp_path / "run", cache)


def codes(results: list[Result]) -> list[int]:
    return [result.code for result in results]


def test_a_finished_run_leaves_what_the_design_names_and_is_not_run_again(run: Run) -> None:
    flags = ("--steps", 6, "--log-interval", 2, "--batch-size", 100)
    first = run.go(*flags)[0]
    assert first.code == 0, first.err
    assert {path.name for path in run.path.iterdir()} == {
        "config.toml",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "lock",
    }
    assert (run.record["status"], run.record["step"], run.record["exit_code"]) == ("finished", 6, 0)
    assert run.record["last_checkpoint"] == "step-00000006"
    assert [row["step"] for row in run.rows("train")] == [2, 4, 6]
    assert [(row["step"], row["images"], row["split"]) for row in run.rows("eval")] == [(6, 360, "test")]
    assert [row["event"] for row in run.rows("event")] == ["start", "save", "save", "finish"]
    again = run.go(*flags)[0]
    assert again.code == 0
    assert "finished" in again.out
    assert [row["step"] for row in run.rows("train")] == [2, 4, 6]


def test_the_headline_is_the_last_epoch_and_a_best_one_of_the_test_split_is_labelled(run: Run) -> None:
    flags = ("--steps", 80, "--batch-size", 48, "--eval-every", "40steps", "--lr", 0.2)
    for more, note in ((), ", picked on the test split: no fair figure"), (("--val-split", 0.2), ""):
        (result,) = run.go(*flags, "--resume", "none", *more, arch=f"{HERE / 'faulty_networks.py'}:fades")
        assert result.code == 0, result.err
        table = result.out[result.out.index("finished") :]
        assert table.index("accuracy, raw weights ") < table.index(f"best, at step 40{note} ")


def test_resume_none_takes_the_next_free_name(run: Run) -> None:
    assert codes(run.go("--steps", 1)) == [0]
    assert codes(run.go("--steps", 1, "--resume", "none")) == [0]
    assert (run.path.with_name("run-2") / "run.json").exists()


def test_other_settings_in_a_run_directory_are_refused_with_what_was_and_what_is_asked(run: Run) -> None:
    run.go("--steps", 1, "--lr", "0.5")
    refused = run.go("--steps", 1, "--lr", "0.25")[0]
    assert refused.code == 2
    assert refused.err.splitlines()[-1].startswith("error: ")
    assert "lr: was 0.5, asked 0.25" in refused.err.splitlines()[-1]
    assert run.record["status"] == "finished"


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_one_process_stops_all_at_one_step_saved(run: Run, number: signal.Signals) -> None:
    job = run.start("--epochs", 1000, "--log-interval", 5, "--eval-every", "end", world=2)
    job.wait_for("step 10/")
    job.send_signal(number, rank=1)
    time.sleep(0.01)
    job.send_signal(number)  # a late one to each must not turn 75 into death by a signal
    results = job.wait(20)
    assert codes(results) == [75, 75]
    step = run.record["step"]
    assert (run.record["status"], run.record["exit_code"]) == ("stopped", 75)
    assert run.record["last_checkpoint"] == f"step-{step:08d}"
    assert f"stopped at step {step}" in results[0].err + results[1].err
    assert run.rows("event")[-1]["event"] == "stop"


def test_a_stop_during_an_evaluation_leaves_it_for_the_resume_and_changes_no_row(run: Run, tmp_path: Path) -> None:
    flags = ("--steps", 4, "--batch-size", 100, "--log-interval", 2, "--eval-every", "2steps", "--eval-batch-size", 1)
    job = run.start(*flags)
    job.wait_for("step 2/4")
    job.send_signal(signal.SIGTERM)
    assert codes(job.wait(20)) == [75]
    assert run.record["step"] == 2
    assert run.rows("eval") == []
    assert codes(run.go(*flags)) == [0]
    straight = Run(run._ranks, tmp_path / "straight", run._cache)
    assert codes(straight.go(*flags)) == [0]
    without_clock = [
        [{k: v for k, v in row.items() if k != "clock"} for kind in ("train", "eval") for row in one.rows(kind)]
        for one in (run, straight)
    ]
    assert without_clock[0] == without_clock[1]
    assert len(without_clock[0]) == 4


def test_max_time_saves_and_ends_with_75(run: Run) -> None:
    result = run.go("--epochs", 1000, "--max-time", "1s", "--eval-every", "end")[0]
    assert result.code == 75
    assert run.record["reason"] == "--max-time"
    assert run.record["last_checkpoint"] == f"step-{run.record['step']:08d}"


@pytest.mark.dist
def test_a_stop_is_told_once_with_its_reason(run: Run) -> None:
    results = run.go("--epochs", 1000, "--max-time", "1s", "--eval-every", "end", world=2)
    assert codes(results) == [75, 75]
    assert results[0].err.count("by --max-time, saved") == 1
    assert results[1].err == ""


def test_a_save_that_is_due_by_the_clock_is_made_once(run: Run) -> None:
    run.go("--epochs", 1000, "--max-time", "3s", "--checkpoint-every", "0.5s", "--eval-every", "end")
    saves = [row["step"] for row in run.rows("event") if row["event"] == "save"]
    by_clock = saves[1:-1]  # without the first and the last
    assert len(by_clock) >= 2
    assert all(later - earlier > 1 for earlier, later in zip(by_clock, by_clock[1:], strict=False))


def test_a_data_set_that_has_changed_is_no_resume(run: Run) -> None:
    from PIL import Image

    folder = run.path.parent / "pictures"
    for split, kind in ((split, kind) for split in ("train", "test") for kind in ("dark", "light")):
        (folder / split / kind).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (32, 32), (40 * number,) * 3).save(folder / split / kind / f"{number}.png")
    flags = ("--dataset", folder, "--batch-size", 4)
    assert codes(run.go(*flags, "--steps", 4)) == [0]
    Image.new("RGB", (32, 32), (1, 2, 3)).save(folder / "train" / "dark" / "0.png")
    changed = run.go(*flags, "--steps", 4)[0]
    assert changed.code == 3
    assert "is not the data set that this run began with" in changed.err


def test_with_no_sound_checkpoint_left_it_begins_anew_and_drops_the_old_rows(run: Run) -> None:
    flags = ("--steps", 4, "--log-interval", 2)
    run.go(*flags)
    shutil.rmtree(run.path / "checkpoints")
    with (run.path / "metrics.jsonl").open("a") as rows:
        rows.write('{"torn')
    assert codes(run.go(*flags)) == [0]
    assert [row["step"] for row in run.rows("train")] == [2, 4]


def test_stop_at_accuracy_ends_the_run_at_the_evaluation_that_reaches_it(run: Run) -> None:
    result = run.go("--epochs", 50, "--eval-every", "3steps", "--stop-at-accuracy", "0.01")[0]
    assert result.code == 0, result.err
    assert (run.record["status"], run.record["step"]) == ("finished", 3)


def test_killed_at_any_moment_while_it_saves_each_step_no_checkpoint_is_lost(run: Run) -> None:
    from dtrain.run import checkpoint

    flags = ("--epochs", 1000, "--checkpoint-every", "1steps", "--keep", 3, "--eval-every", "end", "--batch-size", 32)
    reached = 0
    for attempt in range(4):
        job = run.start(*flags)
        folder = run.path / "checkpoints"
        deadline = time.monotonic() + 20
        while not any(step > reached + 1 for step in checkpoint.listed(folder)):
            assert time.monotonic() < deadline, job.report()
            time.sleep(0.001 * (attempt + 1))
        job.kill()
        found = checkpoint.find(folder)
        assert found.damaged == []
        assert found.checkpoint is not None
        assert found.checkpoint.step > reached
        reached = found.checkpoint.step


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(run: Run) -> None:
    flags = ("--steps", 4, "--checkpoint-every", "2steps", "--keep", 5)
    run.go(*flags)
    newest = run.path / "checkpoints" / "step-00000004" / "network.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    again = run.go(*flags)[0]
    assert again.code == 0
    assert "step-00000004.damaged" in again.err
    assert "goes on at step 2" in again.out
    assert run.record["last_checkpoint"] == "step-00000004"


def test_resume_from_a_named_checkpoint_goes_back_to_it_and_keeps_what_it_undoes(run: Run) -> None:
    flags = ("--steps", 4, "--checkpoint-every", "2steps", "--keep", 5)
    run.go(*flags)
    again = run.go(*flags, "--resume", run.path / "checkpoints" / "step-00000002")[0]
    assert again.code == 0, again.err
    assert "goes on at step 2" in again.out
    assert "step-00000004.undone" in run.checkpoints()
    assert "step-00000004" in run.checkpoints()


def test_resume_from_a_checkpoint_set_aside_says_what_to_rename(run: Run) -> None:
    run.go("--steps", 4, "--checkpoint-every", "2steps")
    folder = run.path / "checkpoints"
    (folder / "step-00000004").rename(folder / "step-00000004.undone")
    before = run.checkpoints()
    (result,) = run.go("--steps", 4, "--resume", folder / "step-00000004.undone")
    assert result.code == 2
    assert result.err.endswith("to go on from it, rename it to step-00000004 and resume from that\n")
    assert run.checkpoints() == before
    shutil.copytree(folder / "step-00000002", folder / "step-00000004")
    (result,) = run.go("--steps", 4, "--resume", folder / "step-00000004.undone")
    assert "to go on from it, move step-00000004 away, then rename it to step-00000004 and" in result.err


def test_a_resume_with_another_output_is_refused_and_with_its_own_goes_on(ranks: Warm, run: Run) -> None:
    run.go("--steps", 2)
    elsewhere = run.path.with_name("elsewhere")
    (result,) = ranks(["--resume", run.path, "--output", elsewhere], world=1)
    assert result.code == 2
    assert result.err == (
        f"error: --resume {run.path} --output {elsewhere}: a run goes on in its own directory; leave --output out, or "
        "begin a new run there without --resume\n"
    )
    assert not elsewhere.exists()
    assert ranks(["--resume", run.path, "--output", f"{run.path}/../run"], world=1)[0].code == 0
    run.path.rename(elsewhere)  # its config.toml names the directory where it began
    assert ranks(["--resume", elsewhere], world=1)[0].code == 0


@pytest.mark.parametrize("part", ["run", "learner"])
def test_a_count_of_a_newer_version_in_a_checkpoint_is_told_with_6(run: Run, part: str) -> None:
    from dtrain.run import checkpoint

    run.go("--steps", 2)
    folder = run.path / "checkpoints"
    saved = checkpoint.load(folder / "step-00000002")
    newer = {**saved.state, part: {**saved.state[part], "mood": "good"}}
    shutil.rmtree(folder / "step-00000002")
    checkpoint.save(folder, 2, saved.parts, newer, saved.about)
    (result,) = run.go("--steps", 2)
    assert (result.code, result.err) == (
        6,
        "error: state.json holds 'mood', which this version of dtrain does not know; use the version that wrote it\n",
    )


def test_a_record_or_a_setting_of_a_newer_version_is_told_with_6_or_2(run: Run) -> None:
    run.go("--steps", 2)
    config = run.path / "config.toml"
    old = config.read_text()
    config.write_text(old + 'mood = "good"\n')
    (result,) = run.go("--steps", 2)
    assert result.code == 2
    assert result.err.startswith(f"error: {config}: mood is not a setting; ")
    assert result.err.endswith("; use the version of dtrain that wrote it\n")
    assert result.err.count("\n") == 1
    config.write_text(old)
    record = run.path / "run.json"
    record.write_text(json.dumps({**run.record, "mood": "good"}))
    (result,) = run.go("--steps", 2)
    assert (result.code, result.err) == (
        6,
        f"error: {record} holds 'mood', which this version of dtrain does not know; use the version that wrote it\n",
    )


def test_a_second_run_in_one_directory_is_refused_while_the_first_lives(run: Run) -> None:
    flags = ("--epochs", 1000, "--log-interval", 5)
    job = run.start(*flags)
    job.wait_for("step 5/")
    second = run.go(*flags)[0]
    assert second.code == 2
    assert "in use by" in second.err
    assert job.codes() == [None]
    job.kill()
    short = run.start(*flags)  # freed by death
    short.wait_for("loss")


def test_a_loss_that_is_not_finite_ends_with_5_and_says_so(run: Run) -> None:
    result = run.go("--steps", 30, "--lr", "1e30", "--log-interval", 5)[0]
    assert result.code == 5
    assert "not finite" in result.err
    assert (run.record["status"], run.record["exit_code"]) == ("failed", 5)


@pytest.mark.dist
def test_a_process_that_raises_tells_its_own_error_and_the_others_stop(run: Run) -> None:
    job = run.start("--steps", 50, world=2, arch=f"{HERE / 'faulty_networks.py'}:raises")
    results = job.wait(30)
    assert codes(results) == [1, 1]
    told = [result.err.count("this network has had enough (a defect") for result in results]
    assert told == [0, 1]
    assert "this network has had enough" in run.record["reason"]
    assert (run.record["status"], run.record["exit_code"]) == ("failed", 1)


@pytest.mark.dist
def test_a_process_that_falls_silent_is_named_within_the_time_limit(run: Run) -> None:
    flags = ("--steps", 50, "--dist-timeout", 4, "--eval-every", "end")
    job = run.start(*flags, world=2, arch=f"{HERE / 'faulty_networks.py'}:sleeps")
    deadline = time.monotonic() + 40
    while job.codes()[0] is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job.codes() == [4, None], job.report()
    assert "error: process 1 (seen before its first step" in job.err(0)
    assert "--dist-timeout 4" in job.err(0)
    assert run.record["exit_code"] == 4


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "world", "reason"),
    [
        ("wrong_logits", 1, "must return logits of shape (2, 10)"),
        ("unused_parameter", 1, "parameter nobody_asks_me gets no gradient"),
        ("unused_parameter", 2, "parameter nobody_asks_me gets no gradient"),
        ("other_weights_on_each_process", 2, "the initial network"),
    ],
)
def test_the_rehearsal_finds_what_is_wrong_with_a_network(run: Run, name: str, world: int, reason: str) -> None:
    results = run.go("--steps", 4, world=world, arch=f"{HERE / 'faulty_networks.py'}:{name}")
    assert set(codes(results)) <= {2, 4}
    assert len(set(codes(results))) == 1
    errors = "".join(result.err for result in results)
    assert errors.count(reason) == 1
    assert run.record["status"] == "failed"


@pytest.mark.dist
def test_only_rank_0_speaks(run: Run) -> None:
    results = run.go("--steps", 2, "--log-interval", 1, world=2)
    assert codes(results) == [0, 0]
    assert "step 2/2" in results[0].out
    assert results[1].out == ""


def test_a_disk_that_is_full_before_the_work_ends_with_6_and_a_later_one_is_tried_again(run: Run) -> None:
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    disk = run.path.parent / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {disk}") != 0:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        run.path = disk / "run"
        flags = ("--steps", 6, "--checkpoint-every", "2steps", "--eval-every", "end", "--log-interval", 2)
        filler = disk / "filler"
        filler.write_bytes(bytes(290_000))
        full = run.go(*flags)[0]
        assert full.code == 6, full.err
        assert "No space left" in full.err
        filler.unlink()
        assert codes(run.go(*flags)) == [0]
    finally:
        os.system(f"umount {disk}")


@pytest.mark.dist
def test_a_run_goes_on_with_the_precision_it_began_with(run: Run) -> None:
    flags = ("--steps", 4, "--amp-dtype", "auto")
    run.go(*flags)
    record = run.record
    record["resolved"]["amp_dtype"] = "float32"  # as if the run had begun on a processor without bfloat16
    (run.path / "run.json").write_text(json.dumps(record))
    results = run.go(*flags, world=2)
    assert codes(results) == [0, 0]
    assert "float32 as this run began" in results[0].out


def test_evaluating_a_run_finds_the_counts_of_its_rows(run: Run, ranks: Warm) -> None:
    run.go("--steps", 60, "--lr", "0.1", "--momentum", "0.9", "--ema", "0.9", "--eval-batch-size", 77)
    rows = {row["weights"]: row for row in run.rows("eval") if row["step"] == 60}
    result = ranks(["eval", run.path, "--json"], world=1)[0]
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["step"] == 60
    assert set(found["weights"]) == {"raw", "ema"} == set(rows)
    for weights, figures in found["weights"].items():
        assert (figures["hits"], figures["hits5"], figures["images"]) == tuple(
            rows[weights][name] for name in ("hits", "hits5", "images")
        )
        assert figures["loss"] == rows[weights]["loss"]
        per_class = figures["per_class"].values()
        assert sum(c["hits"] for c in per_class) == figures["hits"] > 36  # more than one class is found
        assert sum(c["images"] for c in per_class) == 360
    text = ranks(["eval", run.path, "--checkpoint", "best"], world=1)[0]
    assert f"top-1  {rows['raw']['hits']}/360" in text.out
    unknown = ranks(["eval", run.path, "--checkpoint", "17"], world=1)[0]
    assert unknown.code == 2


def test_a_part_of_the_training_set_is_evaluated_on_when_asked_for(run: Run) -> None:
    run.go("--steps", 2, "--val-split", "0.1")
    (row,) = run.rows("eval")
    assert row["split"] == "val"
    assert 140 <= row["images"] <= 147  # a tenth of 1,437, class by class


def test_the_python_api_does_the_same(ranks: Warm, tmp_path: Path, cache: Path) -> None:
    (value,) = ranks.call("test_training:by_api", 1, {"output": tmp_path / "run", "cache": cache})
    assert value["status"] == "finished"
    assert value["hits"] == value["hits_by_hand"]


def by_api(output: Path, cache: Path) -> dict[str, Any]:
    """Train by the Python API, then count by hand with the network that `load_network` gives."""
    import numpy as np
    import torch
    from betons import loaded

    from dtrain import TrainConfig, load_network, train

    config = TrainConfig.of(
        arch=SMALL,
        dataset="digits",
        recipe="none",
        steps=40,
        momentum=0.9,
        cache_dir=cache,
        output=output,
        amp_dtype="float32",
        eval_batch_size=360,
        threads=1,
    )
    summary = train(config)
    network = load_network(output)
    data = loaded(config)
    flat = np.fromfile(data.evaluation.path, np.uint8)
    images = np.stack([flat[int(at) : int(at) + 32 * 32 * 3] for at in data.evaluation.pixel_offsets])
    pixels = images.reshape(-1, 32, 32, 3)[..., :1] / 255  # digits are gray
    normal = (pixels - data.train.gray_mean) / data.train.gray_std
    with torch.no_grad():
        logits = network(torch.from_numpy(normal.astype(np.float32)).permute(0, 3, 1, 2))
    hits = int((logits.argmax(1).numpy() == data.evaluation.labels).sum())
    return {"status": summary.status, "hits": summary.evaluations["raw"].hits, "hits_by_hand": hits}


def test_settings_that_are_refused_before_anything_was_saved_can_be_mended_in_the_same_directory(run: Run) -> None:
    assert codes(run.go("--steps", 2, "--freeze", "nothing.*")) == [2]
    assert codes(run.go("--steps", 2, "--freeze", "0.*")) == [0]


def test_a_checkpoint_that_is_not_there_leaves_a_finished_run_finished(run: Run) -> None:
    run.go("--steps", 2)
    missing = run.path / "checkpoints" / "step-00000077"
    (refused,) = run.go("--steps", 2, "--resume", missing)
    assert refused.code == 2
    assert "no such checkpoint" in refused.err.splitlines()[-1]
    assert run.record["status"] == "finished"


def test_a_freezing_that_outlasts_the_run_is_told(run: Run) -> None:
    (result,) = run.go("--steps", 2, "--freeze", "0.*@7")
    assert "not reached: --freeze 0.*@7 ends with epoch 7" in result.out


def test_one_image_at_a_time_under_batch_norm_is_one_line(run: Run) -> None:
    network = f"{HERE / 'faulty_networks.py'}:needs_two_images"
    (result,) = run.go("--steps", 2, "--batch-size", 3, "--grad-accum-steps", 2, arch=network)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: the network fails in training on 1 image at a time: Expected")
    assert "fewer --grad-accum-steps" in result.err


def test_a_lazy_layer_is_one_line(run: Run) -> None:
    (result,) = run.go("--steps", 2, arch=f"{HERE / 'faulty_networks.py'}:lazy")
    assert result.code == 2
    assert "parameter 1.weight is lazy" in result.err.splitlines()[-1]
