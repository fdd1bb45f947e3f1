"""Claims about plugins, on packages that pip has installed: who is found, who is loaded, whom a broken one hurts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from warm import REPOSITORY, Warm

from dtrain import plugins
from dtrain.commands.new_plugin import new_plugin
from dtrain.errors import PluginError, UsageError
from dtrain.settings.config import TrainConfig

README = REPOSITORY / "plugins" / "README.md"
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

# distribution -> its entry points and the text of its one module, which has the distribution's name
PACKAGES = {
    "first": (
        {
            "architectures": [
                "twice = first:net",
                "typed = first:typed",
                "resnet18 = first:net",
                "number = first:NO",
            ],
            "architecture_families": ["family = first:family"],
            "optimizers": ["own = first:own"],
            "recipes": ["first = first.recipes"],
        },
        """
        from __future__ import annotations
        from typing import TYPE_CHECKING, Literal
        if TYPE_CHECKING:
            from nowhere import Something

        NO = 7

        def net(num_classes, *, in_channels=3):
            return ("first", num_classes, in_channels)

        def typed(
            num_classes: int,
            image_size: int,
            *,
            width: int = 2,
            rate: float | None = None,
            blocks: tuple[int, ...] = (2, 2),
            norm: Literal["batch", "none"] = "none",
            bias: bool = True,
            stem,
            plain=0.5,
            other: Something = None,
        ): ...

        def own(param_groups, *, lr): ...

        class family:
            @staticmethod
            def names():
                return ["small", "large"]

            @staticmethod
            def build(name, num_classes, *, depth: int = 1):
                return (name, num_classes, depth)
        """,
    ),
    "second": (
        {"architectures": ["twice = second:net"], "recipes": ["second = second.recipes"]},
        """
        def net(num_classes):
            return ("second", num_classes)
        """,
    ),
    "third": (
        {
            "schedules": ["half = third:half"],
            "datasets": ["rings = third:rings"],
            "trackers": ["lines = third:Lines"],
            "recipes": ["third = third.recipes"],
        },
        """
        def half(seen, total, *, at: float = 0.5):
            return 1.0 if seen < at * total else 0.5

        def rings(data_dir, *, count: int = 60):
            import numpy as np  # a start that finds the set converted needs none of it

            def split(seed):
                labels = np.arange(count) % 3
                noise = np.random.default_rng(seed).integers(0, 99, (count, 32, 32, 3))
                return labels, (noise + 70 * labels[:, None, None, None]).astype(np.uint8)

            return {
                "digest": "1",
                "class_names": ["dark", "gray", "light"],
                "train": lambda: split(0),
                "test": lambda: split(1),
            }

        class Lines:
            def __init__(self, folder, about, state, *, live):
                self.file = (folder / "lines.txt").open("a")

            def write(self, row):
                print(row.kind, row.step, file=self.file)

            def close(self, exit_code):
                self.file.close()
        """,
    ),
    "broken": (
        {
            "architectures": ["broken_arch = broken:net"],
            "optimizers": ["broken_opt = broken:gone"],
            "recipes": ["broken = broken.recipes"],
        },
        """
        raise SystemExit("no licence found")
        """,
    ),
}
RECIPES = {
    "first": {
        "typed": 'arch = "typed"\nlr = 0.25\n[arch_opt]\nwidth = 4\n',
        "typed-digits": 'arch = "typed"\nlr = 0.5\n',
        "both": "lr = 1.0\n",
        "resnet18-digits": "lr = 9.0\n",
        "mistyped": "learning_rate = 1.0\n",
    },
    "second": {"both": "lr = 2.0\n", "typed-cifar10": "lr = 9.0\n"},
    "third": {},
    "broken": {"torn": "lr = \n"},
}


def write_package(folder: Path, name: str) -> Path:
    groups, code = PACKAGES[name]
    points = "".join(f"dtrain.{group} =\n    " + "\n    ".join(lines) + "\n" for group, lines in groups.items())
    (folder / name / "recipes").mkdir(parents=True)
    (folder / name / "__init__.py").write_text(textwrap.dedent(code))
    for recipe, text in RECIPES[name].items():
        (folder / name / "recipes" / f"{recipe}.toml").write_text(text)
    (folder / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "setuptools.build_meta"\n')
    (folder / "setup.cfg").write_text(
        f"[metadata]\nname = {name}\nversion = 1.5\n[options]\npackages = {name}\n"
        f"[options.package_data]\n{name} = recipes/*.toml\n[options.entry_points]\n{points}"
    )
    return folder


def with_path(folder: Path) -> str:
    """PYTHONPATH with a folder before what it already holds."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the packages and what `dtrain plugins new fresh_net` made."""
    folder = tmp_path_factory.mktemp("plugins")
    sources = [write_package(folder / f"{name}-source", name) for name in PACKAGES]
    sources.append(new_plugin("fresh_net", folder))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*command, *map(str, sources)], check=True, env={**os.environ, **OFFLINE})
    return folder / "site"


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages can be found and imported during one test."""
    monkeypatch.syspath_prepend(str(site))
    for name in [*PACKAGES, "fresh_net"]:
        monkeypatch.setitem(sys.modules, name, None)  # so that the import of one is undone after the test,
        del sys.modules[name]  # and happens anew in it


def load(kind: plugins.Kind, name: str) -> Callable[..., Any]:
    return plugins.load(plugins.find(kind, name))


# -- listing -----------------------------------------------------------------------------------------------------------


def test_the_tables_show_every_package_and_import_none(site: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from dtrain.cli import run\n"
        "for verb in ('archs', 'optimizers', 'plugins'): run([verb, '--json']); print('=')\n"
        "print(sorted({'torch', 'first', 'second', 'third', 'broken', 'fresh_net', 'dtrain_zoo'} & set(sys.modules)))"
    )
    known = {**os.environ, "PYTHONPATH": with_path(site)}
    shown = subprocess.run(
        [sys.executable, "-c", program], env=known, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split("=\n")
    archs, optimizers, everything = (json.loads(part) for part in shown[:3])
    assert {(row["name"], row["distribution"]) for row in archs} == {
        ("allcnn_c", "dtrain"),
        ("resnet18", "dtrain"),
        ("resnet18", "first"),
        ("twice", "first"),
        ("twice", "second"),
        ("typed", "first"),
        ("number", "first"),
        ("family/*", "first"),
        ("broken_arch", "broken"),
        ("fresh_net", "fresh_net"),
    }
    assert [row["name"] for row in optimizers] == ["adam", "adamw", "broken_opt", "muon", "own", "sgd"]
    assert {row["kind"] for row in everything} == {*plugins.KINDS, "recipe"}
    assert {(row["kind"], row["name"]) for row in everything if row["distribution"] == "third"} == {
        ("schedule", "half"),
        ("dataset", "rings"),
        ("tracker", "lines"),
    }
    assert next(row for row in archs if row["name"] == "broken_arch") == {
        "kind": "architecture",
        "name": "broken_arch",
        "distribution": "broken",
        "version": "1.5",
        "value": "broken:net",
    }
    assert shown[3].strip() == "[]"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_a_name_offered_twice_is_an_error_when_it_is_used_and_the_full_names_reach_each() -> None:
    with pytest.raises(PluginError, match="'twice' is offered more than once, as first::twice and second::twice"):
        plugins.find("architecture", "twice")
    assert load("architecture", "first::twice")(10) == ("first", 10, 3)
    assert load("architecture", "second::twice")(10) == ("second", 10)
    assert load("architecture", "Second::twice")(10) == ("second", 10)  # a distribution's name has many spellings


@pytest.mark.usefixtures("installed")
def test_a_built_in_keeps_its_bare_name_and_the_other_is_reached_in_full() -> None:
    assert plugins.find("architecture", "resnet18").distribution == "dtrain"
    assert plugins.find("architecture", "dtrain::resnet18").distribution == "dtrain"
    assert load("architecture", "first::resnet18")(10) == ("first", 10, 3)


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(PluginError, match="architecture 'resnt18' is not installed; did you mean 'resnet18'"):
        plugins.find("architecture", "resnt18")
    with pytest.raises(PluginError, match="'frist::twice' is not installed; did you mean 'first::twice'"):
        plugins.find("architecture", "frist::twice")
    with pytest.raises(PluginError, match="optimizer 'allcnn_c' is not installed"):
        plugins.find("optimizer", "allcnn_c")


@pytest.mark.usefixtures("installed")
def test_a_family_offers_its_members() -> None:
    build = load("architecture", "family/large")
    assert build(10) == ("large", 10, 1)
    assert plugins.parse_options(build, {"depth": "3"}, what="x") == {"depth": 3}
    assert load("architecture", "first::family/small")(2) == ("small", 2, 1)
    with pytest.raises(PluginError, match="family/lage: not in the family family; did you mean 'large'"):
        load("architecture", "family/lage")


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_a_broken_plugin_breaks_only_those_who_ask_for_it() -> None:
    with pytest.raises(PluginError, match=r"broken_arch of broken 1\.5 \(broken:net\).*SystemExit: no licence found"):
        load("architecture", "broken_arch")
    with pytest.raises(PluginError, match="optimizer broken_opt of broken"):
        load("optimizer", "broken_opt")
    assert load("architecture", "second::twice")(10) == ("second", 10)
    assert TrainConfig.of(arch="typed").value("lr") == 0.25


@pytest.mark.usefixtures("installed")
def test_what_is_not_a_function_is_told_with_its_type_and_distribution() -> None:
    with pytest.raises(PluginError, match=r"number of first 1\.5 \(first:NO\) is of type int, not a function"):
        load("architecture", "number")


def test_a_function_of_a_file_is_an_architecture_too(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(f"def net(num_classes): return {folder!r}\n")
    functions = [load("architecture", f"{tmp_path}/{folder}/json.py:net") for folder in "ab"]
    assert [function(10) for function in functions] == ["a", "b"]
    assert sys.modules["json"] is json  # a file takes nobody's place
    for missing in (f"{tmp_path}/none.py:net", f"{tmp_path}/a/json.py:other"):
        with pytest.raises(PluginError, match="could not be imported"):
            load("architecture", missing)


def test_what_an_import_prints_and_where_it_goes_is_no_matter_for_the_caller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loud.py").write_text("import os\nprint('hello')\nos.chdir('/')\ndef net(num_classes): ...\n")
    before = Path.cwd()
    load("architecture", f"{tmp_path}/loud.py:net")
    assert Path.cwd() == before
    assert capsys.readouterr() == ("", "hello\n")


def write_metadata(site: Path, name: str, entry_points: bytes, metadata: str = "Name: {}\nVersion: 1\n") -> None:
    folder = site / f"{name}-1.dist-info"
    folder.mkdir()
    (folder / "entry_points.txt").write_bytes(entry_points)
    (folder / "METADATA").write_text(metadata.format(name))


def test_broken_metadata_breaks_only_those_who_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = b"[dtrain.architectures]\n"
    write_metadata(tmp_path, "latin", group + "h\u00fctte = latin:net\n".encode("latin-1"))
    write_metadata(tmp_path, "torn", group + b"no equals sign\n")
    write_metadata(tmp_path, "nameless", group + b"nameless_net = nameless:net\n", "Version: 1\n")
    write_metadata(tmp_path, "bare", group + b"json_net = json\n")
    write_metadata(tmp_path, "slashed", group + b"of/two::parts = json:dumps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [plugin.name for plugin in plugins.listed("architecture")]
    assert {"allcnn_c", "resnet18", "nameless_net", "json_net", "of/two::parts"} <= set(names)
    assert load("schedule", "constant")(0, 1) == 1.0  # no architecture: torch itself fails to import beside "torn"
    assert plugins.find("architecture", "nameless_net").distribution == "unknown"
    with pytest.raises(PluginError, match="json_net of bare .* its entry point names no function; write module:func"):
        load("architecture", "json_net")
    for name in ("of/two::parts", "slashed::of/two::parts"):
        assert load("architecture", name) is json.dumps


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_options_have_the_types_of_the_signature_even_beside_one_that_cannot_be_read() -> None:
    pairs = {
        "width": "8",
        "rate": "1e-3",
        "blocks": "3,4",
        "norm": "batch",
        "bias": "false",
        "stem": "3",
        "plain": "1",
        "other": "x",
    }
    assert plugins.parse_options(load("architecture", "typed"), pairs, what="typed") == {
        "width": 8,
        "rate": 0.001,
        "blocks": (3, 4),
        "norm": "batch",
        "bias": False,
        "stem": "3",
        "plain": 1.0,
        "other": "x",
    }
    assert plugins.parse_options(load("architecture", "typed"), {"rate": "none"}, what="typed") == {"rate": None}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("widht", "8", "typed has no option 'widht'; did you mean 'width'?"),
        ("num_classes", "8", "typed has no option 'num_classes'"),
        ("image_size", "8", "typed has no option 'image_size'"),
        ("width", "2.5", "typed: width=2.5: give a whole number"),
        ("rate", "fast", "typed: rate=fast: give a number"),
        ("bias", "yes", "typed: bias=yes: give true or false"),
        ("norm", "bach", "typed: norm=bach: not a choice; did you mean 'batch'?"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(name: str, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        plugins.parse_options(load("architecture", "typed"), {name: text}, what="typed")


def test_what_only_kwargs_would_take_is_no_parameter_of_a_function() -> None:
    def net(num_classes: int, *, image_size: int = 32, **options: Any) -> None: ...

    assert [plugins.accepts(net, name) for name in ("image_size", "in_channels")] == [True, False]
    with pytest.raises(UsageError, match="net has no option 'num_classes'"):
        plugins.parse_options(net, {"num_classes": "3"}, what="net")


def test_a_class_gives_the_types_of_its_constructor() -> None:
    class Net:
        width: str

        def __init__(self, num_classes: int, *, width: int = 1) -> None: ...

    assert plugins.parse_options(Net, {"width": "3"}, what="Net") == {"width": 3}


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_a_recipe_comes_with_its_architecture_and_from_no_other_package() -> None:
    assert TrainConfig.of(arch="typed", dataset="digits").value("lr") == 0.5
    config = TrainConfig.of(arch="typed", dataset="cifar10")
    assert [config.value(name) for name in ("lr", "arch_opt", "recipe")] == [0.25, {"width": "4"}, "first::typed"]
    assert TrainConfig.of(arch="resnet18", dataset="digits").value("lr") != 9.0


@pytest.mark.usefixtures("installed")
def test_a_recipe_is_named_like_a_plugin() -> None:
    with pytest.raises(PluginError, match="recipe 'both' is offered more than once, as first::both and second::both"):
        TrainConfig.of(arch="typed", recipe="both")
    assert TrainConfig.of(arch="typed", recipe="second::both").value("lr") == 2.0
    with pytest.raises(PluginError, match="recipe 'allcnn_c-digit' is not installed; did you mean 'allcnn_c-digits'"):
        TrainConfig.of(arch="allcnn_c", recipe="allcnn_c-digit")
    with pytest.raises(PluginError, match="recipe torn of broken cannot be read: .*line 1"):
        TrainConfig.of(arch="typed", recipe="torn")
    with pytest.raises(PluginError, match="recipe mistyped of first: learning_rate is not a setting"):
        TrainConfig.of(arch="typed", recipe="mistyped")


# -- a package of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["My-Net", "class", "json", "allcnn.c", "../net", "taken", "allcnn_c"])
def test_new_refuses_a_name_that_cannot_be_imported_or_is_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match=re.escape(f"plugins new {name}: ")):
        new_plugin(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def train_fresh_net(site: str, output: str, cache: str) -> tuple[str, int]:
    """In a rank: three steps of the package as it was made."""
    from dtrain.training import train

    sys.path.insert(0, site)
    config = TrainConfig.of(
        arch="fresh_net", dataset="digits", steps=3, loader="memory", threads=1, output=output, cache_dir=cache
    )
    return train(config).status, config.augmentation.shift


def test_a_new_package_trains_with_its_own_recipe(ranks: Warm, site: Path, tmp_path: Path) -> None:
    where = {"site": str(site), "output": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    assert ranks.call("test_plugins:train_fresh_net", 1, where) == [("finished", 2)]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    ours = dict.fromkeys(("optimizer", "schedule"), "dtrain 0.1.0")
    assert record["plugins"] == {"architecture": "fresh_net 0.1", **ours}


def train_on_rings(site: str, output: str, cache: str) -> str:
    """In a rank: a run with the schedule, the data set and the tracker of a package, none of which knows dtrain."""
    from dtrain.training import train

    sys.path.insert(0, site)
    small = f"{Path(__file__).with_name('small_network.py')}:small"
    config = TrainConfig.of(
        arch=small,
        dataset="rings",
        dataset_opt=["count=90"],
        schedule="third::half",
        schedule_opt=["at=0.25"],
        track="lines",
        batch_size=30,
        steps=4,
        lr=0.5,
        log_interval=1,
        loader="memory",
        threads=1,
        output=output,
        cache_dir=cache,
    )
    return train(config).status


def test_a_package_offers_a_schedule_a_data_set_and_a_tracker(ranks: Warm, site: Path, tmp_path: Path) -> None:
    where = {"site": str(site), "output": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    known = {"PYTHONPATH": with_path(site)}  # the tracker's process has to find its package as well
    assert ranks.call("test_plugins:train_on_rings", 1, where, env=known) == ["finished"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["plugins"]["schedule"] == "third 1.5"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train, evaluations = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    assert [row["lr"] for row in train] == [0.5, 0.25, 0.25, 0.25]  # at=0.25 of four steps
    assert evaluations[-1]["images"] == 90
    assert [folder.name.rpartition("-")[0] for folder in (tmp_path / "cache").iterdir() if folder.is_dir()] == ["rings"]
    lines = (tmp_path / "run" / "trackers" / "lines" / "lines.txt").read_text().splitlines()
    assert lines == [f"{row['kind']} {row['step']}" for row in rows if row["kind"] != "event"]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_an_empty_folder(tmp_path: Path) -> None:
    commands = "".join(re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL))
    assert commands.count("\n") == 5
    (tmp_path / "work").mkdir()
    known = {
        **os.environ,
        **OFFLINE,
        "PIP_TARGET": str(tmp_path / "site"),
        "PYTHONPATH": with_path(tmp_path / "site"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["sh", "-e", "-c", commands], cwd=tmp_path / "work", env=known, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert done.stdout.count("first rates") == 2


def run_program(text: str) -> None:
    exec(text, {})


def test_the_examples_of_the_readme_pass_its_checks(
    ranks: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *examples, checks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert [re.findall(r"^(?:def|class) (\w+)", example, re.MULTILINE) for example in examples] == [
        ["restarts"],
        ["rings"],
        ["Lines"],
    ]
    (tmp_path / "mine.py").write_text("".join(examples))
    monkeypatch.chdir(tmp_path)
    ranks.call("test_plugins:run_program", 1, {"text": checks})


def test_what_comes_with_dtrain_passes_the_checks() -> None:
    from dtrain.testing import check_dataset, check_schedule

    for plugin in plugins.listed("schedule"):
        check_schedule(plugin.name)
    check_dataset("digits")


def test_a_schedule_or_a_data_set_that_changes_is_refused(tmp_path: Path) -> None:
    from dtrain.testing import check_dataset, check_schedule

    asked: list[float] = []

    def stepped(seen: float, total: float) -> float:
        asked.append(seen)
        return 1 / len(asked)

    def negative(seen: float, total: float) -> float:
        return 1 - 2 * seen / total

    def noisy(data_dir: Path) -> dict[str, Any]:
        def split() -> tuple[list[int], list[Any]]:
            asked.append(0)
            return [0, 1], [np.full((4, 4), len(asked), np.uint8)] * 2

        return {"digest": "1", "class_names": ["a", "b"], "image_size": 4, "train": split, "test": split}

    with pytest.raises(AssertionError, match="schedule stepped gives other factors when it is called in another order"):
        check_schedule(stepped)
    with pytest.raises(PluginError, match="schedule negative gives -0.* after 4 of 7 samples"):
        check_schedule(negative)
    with pytest.raises(AssertionError, match="data set noisy: train has different pictures each time"):
        check_dataset(noisy)

    def versions(data_dir: Path) -> dict[str, Any]:
        asked.append(0)
        return {**noisy(data_dir), "digest": str(len(asked))}

    with pytest.raises(AssertionError, match="data set versions has a different digest each time"):
        check_dataset(versions)
