"""The house is as `design.md` draws it: imports go one way, heavy imports have one door each, setup.cfg is complete."""

from __future__ import annotations

import ast
import configparser
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {
    "dtrain": REPOSITORY / "dtrain",
    "dtrain_zoo": REPOSITORY / "plugins" / "dtrain_zoo",
    "dtrain_bench": REPOSITORY / "benchmarks" / "dtrain_bench",
}
# From the roof down. An import goes to a lower line, or stays in its own package where INSIDE allows it.
STOREYS = (
    ("dtrain.__main__", "dtrain.testing"),
    ("dtrain.cli",),
    ("dtrain.flags",),
    ("dtrain_bench",),
    ("dtrain.commands",),
    ("dtrain",),  # dtrain/__init__.py, the Python API; lazy
    ("dtrain.training",),
    ("dtrain.assembly",),
    ("dtrain.data", "dtrain.model", "dtrain.run"),
    ("dtrain.runtime", "dtrain.world", "dtrain.plan"),
    ("dtrain.rendezvous",),
    ("dtrain.witness",),
    ("dtrain.settings", "dtrain.schedules"),
    ("dtrain.plugins",),
    ("dtrain.settings.values",),  # what a plugin's options are read with as well
    ("dtrain.keyed", "dtrain.files"),
    ("dtrain.errors",),
)
# The same for the rooms of one storey that the drawing orders, but here neighbours on a line may know each other. Rooms
# that it does not name may import any; circles are refused in any case.
INSIDE = (
    (
        ("dtrain.data.dataset",),
        ("dtrain.data.cache", "dtrain.data.loader"),
        ("dtrain.data.ffcv_reader", "dtrain.data.memory_reader", "dtrain.data.pixels"),
        ("dtrain.data.augment", "dtrain.data.beton", "dtrain.data.sources"),
        ("dtrain.data.named", "dtrain.data.offered"),
        ("dtrain.data.layouts", "dtrain.data.members", "dtrain.data.pairs", "dtrain.data.torchvision_sets"),
        ("dtrain.data.batch", "dtrain.data.format", "dtrain.data.pictures"),
    ),
    (
        ("dtrain.run.recorder",),
        ("dtrain.run.tracking",),
        ("dtrain.run.rundir", "dtrain.run.trackers"),
        ("dtrain.run.checkpoint", "dtrain.run.rows"),
    ),
    (
        ("dtrain.model.evaluation", "dtrain.model.rehearsal"),
        ("dtrain.model.step",),
        ("dtrain.model.learner",),
        ("dtrain.model.metrics", "dtrain.model.network", "dtrain.model.nonfinite", "dtrain.model.optimization"),
        ("dtrain.model.groups", "dtrain.model.parallel"),
    ),
)
DOORS = {
    "ffcv": {"dtrain.data.ffcv_reader"},
    "torchvision": {"dtrain.data.torchvision_sets", "dtrain_bench.contenders.task"},
    "wandb": {"dtrain.run.trackers"},
    "tensorboard": {"dtrain.run.trackers"},
    "lightning": {"dtrain_bench.contenders.with_lightning"},
    "accelerate": {"dtrain_bench.contenders.with_accelerate"},
}
LAUNCHERS = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")
FILE_LINES, FUNCTION_LINES = 300, 60


class Import(NamedTuple):
    """One name that a module imports, anywhere in its text; `name` is None for `import module`."""

    line: int
    module: str
    name: str | None


def module_of(path: Path) -> str:
    """The dotted name under which a file of the three packages is imported."""
    for package, folder in PACKAGES.items():
        if path.is_relative_to(folder):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(f"{path} is in no package")


FILES = {
    module_of(path): path
    for folder in PACKAGES.values()
    for path in sorted(folder.rglob("*.py"))
    if "template" not in path.relative_to(folder).parts  # text for others to copy
}


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, also inside functions; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(node.lineno, inner, None) if inner in FILES else Import(node.lineno, base, alias.name)


def height(module: str, storeys: tuple[tuple[str, ...], ...]) -> int | None:
    """How far from the roof the storey of a module is; None for a module that the storeys do not name."""
    parts = module.split(".")
    for room in (".".join(parts[:length]) for length in range(len(parts), 0, -1)):
        for level, rooms in enumerate(storeys):
            if room in rooms and (room != "dtrain" or module == "dtrain"):
                return level
    return None


def goes_up(module: str, target: str) -> bool:
    """Whether an import of `target` by `module` goes against the drawing."""
    package, other = module.split(".")[0], target.split(".")[0]
    if "dtrain_zoo" in (package, other):  # known by the bare loops of the benchmarks, never by the framework
        return (package, other) not in {("dtrain_zoo", "dtrain_zoo"), ("dtrain_bench", "dtrain_zoo")}
    if package == other == "dtrain_bench" or module.split(".")[:2] == target.split(".")[:2] != ["dtrain"]:
        pairs = ((height(module, order), height(target, order)) for order in INSIDE)
        return any(low is not None and high is not None and low > high for low, high in pairs)
    above, below = height(module, STOREYS), height(target, STOREYS)
    return above is None or below is None or above >= below


def test_the_rule_itself_finds_upward_arrows() -> None:
    assert not goes_up("dtrain.training", "dtrain.data.loader")
    assert not goes_up("dtrain.data.loader", "dtrain.data.beton")
    assert not goes_up("dtrain.run.rundir", "dtrain.files")
    assert goes_up("dtrain.settings.config", "dtrain.plan")
    assert goes_up("dtrain.files", "dtrain.keyed")
    assert goes_up("dtrain.run.rundir", "dtrain.data.loader")
    assert goes_up("dtrain.data.beton", "dtrain.data.loader")
    assert goes_up("dtrain.plan", "dtrain")
    assert goes_up("dtrain.training", "dtrain_zoo.allcnn")
    assert goes_up("dtrain_zoo.allcnn", "dtrain.errors")


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    ours = [found for found in imports_of(FILES[module]) if found.module.split(".")[0] in PACKAGES]
    upward = [found for found in ours if goes_up(module, found.module)]
    if module.startswith("dtrain.model."):
        upward = [found for found in upward if found.module != "dtrain.data.batch"]
    assert upward == []


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module: {found.module for found in imports_of(path) if found.module in FILES and found.module != module}
        for module, path in FILES.items()
    }
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert sorted(graph) == []


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_package_has_one_door(package: str) -> None:
    users = {name for name, path in FILES.items() if any(i.module.split(".")[0] == package for i in imports_of(path))}
    assert users <= DOORS[package]


def test_only_world_and_rendezvous_speak_to_other_processes() -> None:
    users = {
        name
        for name, path in FILES.items()
        for found in imports_of(path)
        if f"{found.module}.{found.name}".startswith("torch.distributed") and not found.module.startswith(LAUNCHERS)
    }
    assert users <= {"dtrain.world", "dtrain.rendezvous"}


def test_the_zoo_needs_torch_alone() -> None:
    foreign = {
        found.module.split(".")[0]
        for name, path in FILES.items()
        if name.startswith("dtrain_zoo")
        for found in imports_of(path)
    }
    assert foreign - sys.stdlib_module_names <= {"torch", "dtrain_zoo"}


def test_what_dtrain_is_compared_with_knows_nothing_of_it() -> None:
    known = {
        found.module
        for name, path in FILES.items()
        if name.startswith("dtrain_bench.contenders")
        for found in imports_of(path)
        if found.module.split(".")[0] in PACKAGES and not found.module.startswith("dtrain_bench.contenders")
    }
    assert known == {"dtrain_zoo.allcnn"}


def test_the_benchmarks_use_public_names_only() -> None:
    private = [
        found
        for name, path in FILES.items()
        if name.startswith("dtrain_bench")
        for found in imports_of(path)
        if found.module.startswith("dtrain.") and (found.name or "").startswith("_")
    ]
    assert private == []


def test_setup_cfg_names_every_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    found = {name for name, path in FILES.items() if path.name == "__init__.py"}
    assert found <= set(settings["options"]["packages"].split())


def test_sizes_are_looked_at_not_enforced(capsys: pytest.CaptureFixture[str]) -> None:
    long = []
    for path in FILES.values():
        text = path.read_text(encoding="utf-8")
        name, lines = path.relative_to(REPOSITORY), len(text.splitlines())
        if lines > FILE_LINES:
            long.append(f"{name} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    long.append(f"{name}: {node.name} has {length} lines")
    with capsys.disabled():
        print("".join(f"\nto look at: {finding}" for finding in long), end="\n" if long else "")


def test_the_whole_config_is_a_parameter_in_assembly_training_and_commands_alone() -> None:
    takers = set()
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if any(a.annotation is not None and "TrainConfig" in ast.unparse(a.annotation) for a in arguments):
                    takers.add(module)
    allowed = {"dtrain.assembly", "dtrain.training", "dtrain.settings.identity"}
    assert {module for module in takers if not module.startswith("dtrain.commands.")} <= allowed
