"""The README is true: its commands run, its loop and tree are those of the source, its figures those of the records."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from dtrain_bench.peers import table
from warm import Warm

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "benchmarks" / "results"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line[:1] == [program]]


def test_the_loop_is_the_one_in_training_py() -> None:
    (loop,) = (block for block in blocks("python") if "while state.step" in block)
    source = (REPOSITORY / "dtrain" / "training.py").read_text(encoding="utf-8")
    start = source.index("            while state.step")
    end = source.index("        return self.finish()")
    assert loop == textwrap.dedent(source[start:end])


def test_the_tree_names_what_is_there_and_all_of_it() -> None:
    (tree,) = (block for block in blocks("text") if block.startswith("dtrain/"))
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        path = folder + name if line.startswith(" ") else name
        assert (REPOSITORY / path).exists(), path
        named.add(path)
    modules = {f"dtrain/{path.name}" for path in (REPOSITORY / "dtrain").glob("[!_]*.py")}
    rooms = {f"dtrain/{path.parent.name}/" for path in (REPOSITORY / "dtrain").glob("*/__init__.py")}
    assert modules | rooms <= named


def test_the_output_shown_is_the_end_of_the_record() -> None:
    (output,) = (block for block in blocks("text") if "test accuracy" in block)
    log = (RESULTS / "cifar10-allcnn_c" / "log.txt").read_text(encoding="utf-8")
    assert log.rstrip().endswith(output.split("...\n", 1)[-1].rstrip())
    first = output.split("...\n", 1)[0]
    assert log.startswith(first)


def test_the_table_says_what_the_records_say() -> None:
    logs = sorted(RESULTS.glob("*/log.txt"))
    assert len(logs) >= 2
    for path in logs:
        log = path.read_text(encoding="utf-8")
        (accuracy,) = re.findall(r"test accuracy, raw weights +(\d+/\d+ = [\d.]+ %)", log)
        (seconds,) = re.findall(r"time +train ([\w ]+),", log)
        (row,) = (line for line in README.splitlines() if str(path.relative_to(REPOSITORY)) in line)
        assert accuracy in row
        assert f"in {seconds}" in row
    for name in ("overhead", "loaders"):
        record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for result in record["results"].values():
            assert result["turns"] >= 9
            low, high = result["ratio_quartiles"]
            assert f"{result['ratio_median']:.2f} [{low:.2f}, {high:.2f}]" in README


def test_the_comparison_with_others_is_the_record_s() -> None:
    record = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    assert record["turns"] >= 5
    assert table(record) in README  # python -m dtrain_bench.peers < benchmarks/results/peers.json


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


@pytest.mark.slow
@pytest.mark.dist
def test_its_training_commands_run(ranks: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand but for their length: on digits, three small steps."""
    monkeypatch.chdir(tmp_path)
    (net,) = (block for block in blocks("python") if block.startswith("# net.py"))
    (tmp_path / "net.py").write_text(net)
    short = ["--dataset", "digits", "--steps", "3", "--recipe", "none", "--batch-size", "32"]
    trainings = [line[2:] for line in commands("dtrain") if line[1] == "train"]
    trainings += [line[line.index("dtrain") + 1 :] for line in commands("torchrun")]
    assert len(trainings) == 3
    for flags in trainings:
        if "--nproc" in flags:
            at = flags.index("--nproc")
            del flags[at : at + 2]
        kept = [flag for flag in flags if flag not in ("--epochs", "2")]
        results = ranks([*kept, *short], world=1)
        assert results[0].code == 0, results[0].err
    listed = ranks(["runs"], world=1)[0]
    assert listed.out.count("finished") == 2  # two of the commands are one run, found again
    run = next((tmp_path / "runs").iterdir())
    evaluated = ranks(["eval", run], world=1)[0]
    assert evaluated.code == 0
    assert "top-1" in evaluated.out


@pytest.mark.slow
@pytest.mark.timeout(900)  # the one with stages makes a run of 116 steps twice, stopped five times
@pytest.mark.parametrize("number", range(3))
def test_its_proofs_hold(ranks: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(tmp_path)
    proofs = [line[1:] for line in commands("dtrain") if line[1] == "prove"]
    assert len(proofs) == 3
    result = ranks(proofs[number], world=1, timeout=850)[0]
    assert result.code == 0, result.err
    assert "proven: " in result.out


def test_its_python_runs(ranks: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "TrainConfig.of" in block)
    short = block.replace("epochs=1", "steps=2")
    assert short != block
    assert ranks.call("test_readme:executed", 1, {"text": short}) == ["AllCNN"]


def executed(text: str) -> str:
    names: dict[str, object] = {}
    exec(text, names)
    return type(names["network"]).__name__
