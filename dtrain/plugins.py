"""Entry points -> Plugin records; one of them resolved by name; options read from a function's own signature.

Listing reads metadata and imports nothing. One entry point is loaded, when it is named, in every process; whatever it
raises names its distribution and touches nobody else. No torch here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dtrain.errors import PluginError, UsageError, nearest

Kind = Literal["architecture", "optimizer"]
OURS = "dtrain"
PASSED = ("num_classes", "in_channels", "image_size", "param_groups", "lr")  # what the trainer gives itself


@dataclass(frozen=True)
class Plugin:
    """Where a name leads: the distribution that offers it and the `module:attribute` behind it."""

    kind: str
    name: str
    distribution: str
    version: str
    value: str


def listed(kind: Kind) -> list[Plugin]:
    """Every plugin of a kind, families as `family/*`, sorted by name. Reads metadata; imports nothing."""
    single = [_plugin(kind, entry, entry.name) for entry in _entries(f"dtrain.{kind}s")]
    families = [_plugin(kind, entry, f"{entry.name}/*") for entry in _entries(f"dtrain.{_family_word(kind)}")]
    return sorted({*single, *families}, key=lambda p: (p.name, p.distribution))


def find(kind: Kind, name: str) -> Plugin:
    """The plugin that `name` means: a bare name, `distribution::name`, `family/name` or `./file.py:function`.

    A name of dtrain's own keeps its meaning. Raises PluginError for an unknown name (with the nearest) and for one that
    two third parties offer (with both full names).
    """
    if ".py:" in name:
        return Plugin(kind, name, Path(name.partition(":")[0]).name, "local", name)
    plugins = listed(kind)
    distribution, _, bare = name.rpartition("::")
    wanted = bare.partition("/")[0] + "/*" if "/" in bare else bare
    found = [p for p in plugins if p.name == wanted and distribution in ("", p.distribution)]
    ours = [p for p in found if p.distribution == OURS]
    if len(found) > 1 and not ours:
        both = " and ".join(f"{p.distribution}::{bare}" for p in found)
        raise PluginError(f"{kind} {name!r} is offered twice, as {both}; give one of these")
    if not found:
        raise PluginError(f"{kind} {name!r} is not installed; {nearest(bare, [p.name for p in plugins])}")
    chosen = (ours or found)[0]
    return Plugin(kind, bare, chosen.distribution, chosen.version, chosen.value)


def load(plugin: Plugin) -> Callable[..., Any]:
    """Import a plugin and return its function. Raises PluginError, naming distribution and cause, if that fails."""
    try:
        target = _import_file(plugin.value) if plugin.version == "local" else _import(plugin.value)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{plugin.kind} {plugin.name} of {plugin.distribution} {plugin.version} ({plugin.value}) could not be "
            f"imported: {type(error).__name__}: {error}"
        ) from error
    if "/" in plugin.name and plugin.version != "local":
        family, member = target, plugin.name.partition("/")[2]
        if member not in family.names():
            raise PluginError(f"{plugin.kind} {plugin.name}: not in that family; {nearest(member, family.names())}")
        return lambda *args, **options: family.build(member, *args, **options)
    if not callable(target):
        raise PluginError(
            f"{plugin.kind} {plugin.name} of {plugin.distribution} ({plugin.value}) is a {type(target).__name__}, "
            "not a function; see plugins/README.md"
        )
    function: Callable[..., Any] = target
    return function


def _entries(group: str) -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=group))


def _family_word(kind: str) -> str:
    return f"{kind}_families"


def _plugin(kind: str, entry: importlib.metadata.EntryPoint, name: str) -> Plugin:
    dist = entry.dist
    return Plugin(kind, name, dist.name if dist else "unknown", dist.version if dist else "unknown", entry.value)


def _import(value: str) -> Any:
    module, _, attribute = value.partition(":")
    target: Any = importlib.import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part)
    return target


def _import_file(value: str) -> Any:
    path, _, attribute = value.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a class's module up there
    spec.loader.exec_module(module)
    return getattr(module, attribute)


# -- options ---------------------------------------------------------------------------------------------------------


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a plugin's function that a user may give."""
    parameters = inspect.signature(function).parameters.values()
    given = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = {p.name: p for p in parameters if p.kind in given and p.default is not inspect.Parameter.empty}
    return {name: p for name, p in needed.items() if name not in PASSED}


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes `name` by keyword, by itself or through **options."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of parameter `name`, None where it has none."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def parse_options(function: Callable[..., Any], pairs: Mapping[str, str], *, what: str) -> dict[str, Any]:
    """Values typed by the function's annotations from text by name.

    Raises UsageError, naming `what`, for a name it does not take (with the nearest) or a value of another type.
    """
    known = options_of(function)
    hints = get_type_hints(function)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    values = {}
    for name, text in pairs.items():
        if name not in known and (not open_ended or name in PASSED):
            raise UsageError(f"{what} has no option {name!r}; {nearest(name, known)}")
        try:
            values[name] = _typed(hints.get(name, str), text)
        except ValueError as error:
            raise UsageError(f"{what}: {name}={text}: {error}") from None
    return values


def _typed(hint: Any, text: str) -> Any:  # noqa: C901 - one branch a type
    if get_origin(hint) in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _typed(next(a for a in get_args(hint) if a is not type(None)), text)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if text not in map(str, choices):
            raise ValueError(nearest(text, map(str, choices)))
        return next(c for c in choices if str(c) == text)
    if get_origin(hint) is tuple:
        return tuple(_typed(get_args(hint)[0], part) for part in text.split(","))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("give true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"give {'a whole' if hint is int else 'a'} number") from None
    return text


# -- recipes ---------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Path]:
    """Every recipe by name, from all packages; one of dtrain's own keeps its name. Imports nothing."""
    found: dict[str, Path] = {}
    entries = _entries("dtrain.recipes")
    for entry in sorted(entries, key=lambda e: e.dist is not None and e.dist.name == OURS):
        folder = _folder_of(entry.value)
        if folder is not None:
            found.update({path.stem: path for path in sorted(folder.glob("*.toml"))})
    return found


def _folder_of(package: str) -> Path | None:
    # the spec of `package.recipes` would run package/__init__.py; the spec of the first name alone does not
    top, *rest = package.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *rest)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe file. Raises PluginError naming the file if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"recipe {path.stem} ({path}) cannot be read: {error}") from None


def recipe_for(arch: str, dataset: str) -> str | None:
    """The recipe for this architecture on this data set; else the architecture's without a data set; else None."""
    matching = {}
    for name, path in recipes().items():
        settings = read_recipe(path)
        if settings.get("arch") == arch and settings.get("dataset") in (dataset, None):
            matching[settings.get("dataset")] = name
    return matching.get(dataset, matching.get(None))
