"""Entry points -> Plugin records; one of them resolved by name; options read from a function's own signature.

Listing reads metadata and imports nothing. One entry point is loaded, when it is named, in every process; whatever it
raises names its distribution and touches nobody else. The contract for authors is plugins/README.md. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dtrain.errors import PluginError, UsageError, nearest

Kind = Literal["architecture", "optimizer"]
OURS = "dtrain"
LOCAL = "local"  # the version of a file named on the command line
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
    families = [_plugin(kind, entry, f"{entry.name}/*") for entry in _entries(f"dtrain.{kind}_families")]
    return sorted({*single, *families}, key=lambda p: (p.name, p.distribution))


def find(kind: Kind, name: str) -> Plugin:
    """The plugin that `name` means: a bare name, `distribution::name`, `family/name` or `./file.py:function`.

    A name of dtrain's own keeps its meaning. Raises PluginError for an unknown name (with the nearest) and for one that
    two third parties offer (with both full names).
    """
    if ".py:" in name:
        return Plugin(kind, name, Path(name.rpartition(":")[0]).name, LOCAL, name)
    bare = name.rpartition("::")[2]
    wanted = bare.partition("/")[0] + "/*" if "/" in bare else bare
    chosen = _chosen(kind, name, wanted, listed(kind))
    return Plugin(kind, bare, chosen.distribution, chosen.version, chosen.value)


def identity(plugin: Plugin) -> str:
    """Distribution and version, or a file's name and a digest of its content: what a run was made with."""
    if plugin.version != LOCAL:
        return f"{plugin.distribution} {plugin.version}"
    with contextlib.suppress(OSError):
        content = Path(plugin.value.rpartition(":")[0]).read_bytes()
        return f"{plugin.distribution} {hashlib.sha256(content).hexdigest()[:12]}"
    return plugin.distribution  # which could not be loaded either


def _chosen(kind: str, asked: str, wanted: str, plugins: Sequence[Plugin]) -> Plugin:
    """The one of `plugins` with the name `wanted` that `asked` means."""
    distribution, scoped, bare = asked.rpartition("::")
    found = [p for p in plugins if p.name == wanted and (not scoped or _same(p.distribution, distribution))]
    ours = [p for p in found if p.distribution == OURS]
    if len(found) > 1 and not ours:
        both = " and ".join(f"{p.distribution}::{bare}" for p in found)
        raise PluginError(f"{kind} {asked!r} is offered more than once, as {both}; give one of these")
    if not found:
        names = [f"{p.distribution}::{p.name}" if scoped else p.name for p in plugins]
        raise PluginError(f"{kind} {asked!r} is not installed; {nearest(asked, names)}")
    return (ours or found)[0]


def _same(distribution: str, other: str) -> bool:
    """Whether two spellings name one distribution, by the rule of the package index."""
    return re.sub(r"[-_.]+", "-", distribution).lower() == re.sub(r"[-_.]+", "-", other).lower()


def load(plugin: Plugin) -> Callable[..., Any]:
    """Import a plugin and return its function. Raises PluginError, naming distribution and cause, if that fails."""
    family, _, member = plugin.name.partition("/") if plugin.version != LOCAL else ("", "", "")
    try:
        target = _import_file(plugin.value) if plugin.version == LOCAL else _import(plugin.value)
        members = list(target.names()) if member else []
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{plugin.kind} {plugin.name} of {plugin.distribution} {plugin.version} ({plugin.value}) could not be "
            f"imported: {type(error).__name__}: {error}"
        ) from error
    if member:
        if member not in members:
            raise PluginError(f"{plugin.kind} {plugin.name}: not in the family {family}; {nearest(member, members)}")
        return functools.partial(target.build, member)
    if not callable(target):
        raise PluginError(
            f"{plugin.kind} {plugin.name} of {plugin.distribution} ({plugin.value}) is of type "
            f"{type(target).__name__}, not a function; see plugins/README.md"
        )
    function: Callable[..., Any] = target
    return function


def _entries(group: str) -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=group))


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
    text, _, attribute = value.rpartition(":")
    path = Path(text).resolve()
    # a name of its own: ./torch.py or two files called net.py must not take each other's place
    name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up there
    sys.path.insert(0, str(path.parent))  # the file may import its neighbours, as a script may
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return getattr(module, attribute)


# -- options ---------------------------------------------------------------------------------------------------------


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a plugin's function that a user may give: keyword-only ones, and others that have a default."""
    return {
        p.name: p
        for p in inspect.signature(function).parameters.values()
        if p.name not in PASSED
        and (
            p.kind is inspect.Parameter.KEYWORD_ONLY
            or (p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and p.default is not inspect.Parameter.empty)
        )
    }


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes `name` by keyword, by itself or through **options."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of parameter `name`, None where it has none."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def parse_options(function: Callable[..., Any], pairs: Mapping[str, str], *, what: str) -> dict[str, Any]:
    """Values from text by name, typed by the function's annotations, or by its defaults where it has none.

    Raises UsageError, naming `what`, for a name it does not take (with the nearest) or a value of another type.
    """
    known = options_of(function)
    hints = _hints(function)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    values = {}
    for name, text in pairs.items():
        if name not in known and (not open_ended or name in PASSED):
            raise UsageError(f"{what} has no option {name!r}; {nearest(name, known)}")
        default = known[name].default if name in known else inspect.Parameter.empty
        plain = type(default) if isinstance(default, bool | int | float) else str
        try:
            values[name] = _typed(hints.get(name, plain), text)
        except ValueError as error:
            raise UsageError(f"{what}: {name}={text}: {error}") from None
    return values


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what a call of `function` runs; without those that only a type checker can evaluate."""
    while isinstance(function, functools.partial):
        function = function.func
    code: Any = function.__init__ if inspect.isclass(function) else function
    code = code if inspect.isroutine(code) else type(code).__call__
    try:
        return get_type_hints(code)
    except Exception:  # a name imported under TYPE_CHECKING spoils them all: take them one by one
        scope = getattr(code, "__globals__", {})
        return {name: hint for name, text in inspect.get_annotations(code).items() if (hint := _evaluated(text, scope))}


def _evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, scope)  # as typing.get_type_hints does; the plugin's own text
    except Exception:
        return None


def _typed(hint: Any, text: str) -> Any:
    origin, arms = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _typed(next(a for a in arms if a is not type(None)), text)
    if origin is Literal:
        if text not in map(str, arms):
            raise ValueError(nearest(text, map(str, arms)))
        return next(c for c in arms if str(c) == text)
    if origin in (tuple, list, Sequence):
        return (list if origin is list else tuple)(_typed(arms[0], part.strip()) for part in text.split(","))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("give true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"give a {'whole ' if hint is int else ''}number") from None
    return text


# -- recipes ---------------------------------------------------------------------------------------------------------


def recipes() -> list[Plugin]:
    """Every recipe of every package, sorted by name; `value` is the path of its file. Imports nothing, reads none."""
    found = set()
    for entry in _entries("dtrain.recipes"):
        folder = _folder_of(entry.value)
        for path in folder.glob("*.toml") if folder is not None else ():
            found.add(replace(_plugin("recipe", entry, path.stem), value=str(path)))
    return sorted(found, key=lambda p: (p.name, p.distribution))


def find_recipe(name: str) -> Plugin:
    """The recipe that `name` or `distribution::name` means, by the rules of `find`. Raises PluginError."""
    return _chosen("recipe", name, name.rpartition("::")[2], recipes())


def recipe_for(arch: str, dataset: str) -> str | None:
    """The recipe that comes with an architecture: `<arch>-<dataset>`, else `<arch>`, of its own package; else None."""
    try:
        owner = find("architecture", arch)
    except PluginError:
        return None  # told where the architecture is used
    offered = {p.name for p in recipes() if p.distribution == owner.distribution}
    name = next((name for name in (f"{owner.name}-{dataset}", owner.name) if name in offered), None)
    return name if name is None or owner.distribution == OURS else f"{owner.distribution}::{name}"


def read_recipe(recipe: Plugin) -> dict[str, Any]:
    """The settings of a recipe, without what it says `about` itself. Raises PluginError if it is not TOML."""
    try:
        settings = tomllib.loads(Path(recipe.value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"recipe {recipe.name} of {recipe.distribution} cannot be read: {error}") from None
    settings.pop("about", None)
    return settings


def _folder_of(package: str) -> Path | None:
    # the spec of `package.recipes` would run package/__init__.py; the spec of the first name alone does not
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *rest)
