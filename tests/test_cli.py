"""Claims about the command line: light to ask, every flag explained, every mistake told in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm import Warm

from dtrain.settings.config import PANELS, SETTINGS
from dtrain.settings.values import flag_of

OWN_FLAGS = ["--config", "--dry-run", "--nproc", "--debug"]  # of `dtrain train`, beside those of the settings
HEAVY = {"torch", "torchvision", "numba", "ffcv", "dtrain_zoo", "wandb", "tensorboard"}


def dtrain(*arguments: str, cwd: Path | None = None, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python -m dtrain *arguments` as it is typed, on a terminal of 100 columns."""
    known = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    command = [sys.executable, *python, "-m", "dtrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=known, cwd=cwd, timeout=60)


def imported(stderr: str) -> set[str]:
    """The top packages in what `-X importtime` wrote."""
    return {line.rpartition("|")[2].strip().split(".")[0] for line in stderr.splitlines() if "|" in line}


@pytest.fixture(scope="module")
def train_help() -> str:
    shown = dtrain("train", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    return shown.stdout


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_and_tables_import_nothing_heavy() -> None:
    for arguments in (["--help"], ["archs", "--json"], ["config", "show", "--arch", "allcnn_c", "--json"]):
        shown = dtrain(*arguments, python=("-X", "importtime"))
        assert shown.returncode == 0
        assert "typer" in imported(shown.stderr)
        assert imported(shown.stderr) & HEAVY == set()


def test_dtrain_alone_prints_its_help() -> None:
    alone, asked = dtrain(), dtrain("--help")
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout.strip() == asked.stdout.strip()
    verbs = "train config eval replay runs sync archs optimizers plugins data prove bench"
    for verb in verbs.split():
        assert re.search(rf"│ {verb} +\w", alone.stdout), verb


def test_every_flag_is_in_a_panel_with_words_about_it(train_help: str) -> None:
    assert re.findall(r"╭─ ([\w ]+?) ─+╮", train_help) == ["Options", *(panel.title for panel in PANELS)]
    rows = [row.strip("│ ") for row in train_help.splitlines() if row.startswith("│ -")]
    heads = [re.match(r"(-[-\w]*[, ]*)+", row) for row in rows]
    shown = {flag for head in heads if head for flag in re.split(r"[, ]+", head.group())}
    wanted = {flag for known in SETTINGS.values() for flag in known.flags or [flag_of(known.name)]} | {*OWN_FLAGS}
    assert shown - {"", "-h", "--help"} - {flag for flag in shown if flag.startswith("--no-")} == wanted
    texts = [row[head.end() :] for row, head in zip(rows, heads, strict=True) if head]
    assert [text for text in texts if len(text.split()) < 3] == []  # the kind of value, and words


@pytest.mark.parametrize(
    "words",
    [
        "--lr X peak learning rate; it is not rescaled with the batch size",
        "--batch-size -b N images in one step, over all processes together; 64,640@200 means 64 at first and 640 from "
        "epoch 200 on, counted from 0 [default: 128]",
        "--epochs X passes over the training set; fractions such as 2.5 are allowed [default: 10]",
        "--dist-timeout X seconds after which a process that does not answer is given up and the run ends",
        "--nproc N number of processes to start on this machine [default: 1]",
        "--output PATH run directory [default: runs/<arch>-<dataset>-<digest of the settings>]",
        "--amp-dtype TEXT data type of autocast (mixed precision); the weights stay float32;",
        "--eval-every TEXT how often to evaluate: 500steps, 1epoch, or end [default: 1epoch]",
        "--track NAME,NAME trackers that the metrics are sent to, comma-separated, such as wandb,tensorboard,csv",
        "--flip --no-flip random horizontal flip of half of the images [default: no]",
    ],
)
def test_help_tells_meaning_unit_choices_and_default(train_help: str, words: str) -> None:
    flat = " ".join(train_help.replace("│", " ").split())
    assert words in flat


# -- one code path, and JSON -------------------------------------------------------------------------------------------


def test_flags_without_a_verb_mean_train(ranks: Warm, tmp_path: Path) -> None:
    network = f"{Path(__file__).with_name('small_network.py')}:small"
    flags = ["--model", network, "--dataset", "digits", "--recipe", "none", "-b", "100", "--steps", "2", "--wd", "0.01"]
    places = ["--cache-dir", tmp_path / "cache", "--loader", "memory", "--threads", "1"]
    for verb, run in ([], "a"), (["train"], "b"):
        (result,) = ranks([*verb, *flags, *places, "--output", tmp_path / run], world=1)
        assert result.code == 0, result.err
    configs = [(tmp_path / run / "config.toml").read_text().replace(str(tmp_path / run), "") for run in "ab"]
    assert configs[0] == configs[1]
    (listed,) = ranks(["runs", tmp_path, "--json"], world=1)
    rows = json.loads(listed.out)
    assert [(row["run"], row["status"], row["step"]) for row in rows] == [("a", "finished", 2), ("b", "finished", 2)]
    (table,) = ranks(["runs", tmp_path], world=1)
    assert table.out.splitlines()[0].split()[:3] == ["run", "status", "step"]


def test_tables_are_json_on_request(ranks: Warm) -> None:
    names = {}
    for verb in ("archs", "optimizers", "plugins", "runs"):
        (result,) = ranks([verb, "--json"], world=1)
        assert result.code == 0, result.err
        names[verb] = [row["name"] for row in json.loads(result.out)] if verb != "runs" else json.loads(result.out)
    assert {"allcnn_c", "resnet18"} <= set(names["archs"])
    assert {"sgd", "adam", "adamw", "muon"} <= set(names["optimizers"])
    assert {*names["archs"], *names["optimizers"], "allcnn_c-digits"} <= set(names["plugins"])


def test_config_show_prints_each_value_with_its_origin(ranks: Warm) -> None:
    asked = ["config", "show", "--arch", "allcnn_c", "--dataset", "digits", "--lr", "0.2"]
    (result,) = ranks([*asked, "--json"], world=1)
    rows = {row["setting"]: (row["value"], row["from"]) for row in json.loads(result.out)}
    assert rows["lr"] == (0.2, "flag")
    assert rows["batch_size"] == (64, "recipe allcnn_c-digits")
    assert rows["seed"] == (0, "default")
    (table,) = ranks(asked, world=1)
    assert re.search(r"^lr +0\.2 +flag$", table.out, re.MULTILINE)
    assert re.search(r"^arch_opt +norm=batch +recipe allcnn_c-digits$", table.out, re.MULTILINE)


def test_a_dry_run_tells_what_a_run_would_begin_with_and_leaves_none(ranks: Warm, tmp_path: Path) -> None:
    flags = ["--arch", "allcnn_c", "--dataset", "digits", "--amp-dtype", "float32", "--threads", "1", "--dry-run"]
    (result,) = ranks([*flags, "--cache-dir", tmp_path / "cache", "--output", tmp_path / "run"], world=1)
    assert result.code == 0, result.err
    assert not (tmp_path / "run").exists()
    # 1,369,738, less the filters of two of three channels, since digits are gray; and for the batch norm of the recipe
    # two numbers a channel in place of a bias's one
    parameters = 1_369_738 - 2 * 96 * 9 + 3 * 96 + 5 * 192
    for fact in (
        "batch 64 = 1 process",
        "22 steps an epoch = 1437 // 64; 29 images of each epoch's order are left out",
        "176 steps in all = 8 epochs",
        "[64, 1, 32, 32] float32",
        "[64, 10]",
        f"{parameters:,}",
        f"{8 * parameters / 2**20:.1f} MiB",
        # 0.1 x 1/23, 2/23, ...: a warm-up of 22 steps
        "0.004348, 0.008696, 0.01304, 0.01739, 0.02174",
    ):
        assert fact in result.out, fact


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_mistake_is_told_as_it_is_typed(tmp_path: Path) -> None:
    done = dtrain("--arch", "alcnn_c", cwd=tmp_path, python=("-v",))
    assert (done.returncode, done.stdout) == (2, "")
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: architecture 'alcnn_c' is not installed; did you mean 'allcnn_c'?"
    ]
    assert "import 'torch'" not in done.stderr  # nobody waits for torch to be told of a slip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train", "--arch is missing; `dtrain archs` lists what there is, for a start: --arch allcnn_c"),
        ("trian --arch allcnn_c", "No such command 'trian'. Did you mean 'train'?"),
        ("--arch allcnn_c --scheduel linear", "--scheduel is not a flag; did you mean '--schedule'?"),
        ("runs --jsn", "--jsn is not a flag; did you mean '--json'?"),
        ("--arch allcnn_c --schedule cosin", "schedule 'cosin' is not installed; did you mean 'cosine'?"),
        ("--arch allcnn_c --opt sdg", "optimizer 'sdg' is not installed; did you mean 'sgd'?"),
        ("--arch allcnn_c --track csv,wandbb", "tracker 'wandbb' is not installed; did you mean 'wandb'?"),
        ("--arch allcnn_c --recipe allcnn", "recipe 'allcnn' is not installed; did you mean 'allcnn_c'?"),
        ("--arch allcnn_c --lr fast", "--lr fast: give a number"),
        ("--arch allcnn_c --lr", "Option '--lr' requires an argument."),
        ("--arch allcnn_c --nproc 0", "--nproc 0: give 1 or more"),
        ("--arch allcnn_c --nproc two", "Invalid value for '--nproc'"),
        ("--resume nowhere", "--resume nowhere: no run is there"),
        ("plugins new class", "plugins new class: give a name that Python can import, such as my_net"),
    ],
)
def test_a_wrong_word_ends_with_2_and_one_line(ranks: Warm, tmp_path: Path, arguments: str, told: str) -> None:
    places = ["--data-dir", str(tmp_path)] if "--arch" in arguments and "trian" not in arguments else []
    words = arguments.split()
    cut = 0 if words[-1] == "--lr" else len(words)  # what lacks its value stays last
    (result,) = ranks([*words[:cut], *places, *words[cut:]], world=1)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {told}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--opt adam --momentum 0.9", "--momentum: optimizer adam has no use for it; leave it out"),
        ("--opt adamw --nesterov", "--nesterov: optimizer adamw has no use for it; leave it out"),
        ("--opt sgd --opt-opt betas=0.9,0.9", "optimizer sgd has no option 'betas'"),
        ("--arch-opt nrom=batch", "architecture allcnn_c has no option 'nrom'; did you mean 'norm'?"),
        ("--arch-opt norm=bach", "architecture allcnn_c: norm=bach: not a choice; did you mean 'batch'?"),
    ],
)
def test_an_option_nobody_has_a_use_for_is_an_error(ranks: Warm, tmp_path: Path, arguments: str, told: str) -> None:
    flags = ["--arch", "allcnn_c", "--dataset", "digits", "--cache-dir", tmp_path, "--threads", "1", "--dry-run"]
    (result,) = ranks([*flags, *arguments.split()], world=1)
    assert result.code == 2, result.out
    assert result.err.startswith(f"error: {told}")
    assert result.err.count("\n") == 1


def test_nproc_under_torchrun_is_refused(ranks: Warm) -> None:
    first, second = ranks(["--arch", "allcnn_c", "--dataset", "digits", "--nproc", "2"], world=2)
    assert (first.code, second.code) == (2, 2)
    assert first.err == "error: --nproc 2: torchrun has already started 2 processes; leave it out\n"
    assert second.err == ""  # once a host


def test_debug_adds_the_traceback(ranks: Warm) -> None:
    (result,) = ranks(["--arch", "allcnn_c", "--lr", "fast", "--debug"], world=1)
    assert result.code == 2
    assert result.err.startswith("Traceback")
    assert result.err.endswith("error: --lr fast: give a number\n")
