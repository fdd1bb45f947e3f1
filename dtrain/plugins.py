"""The one door for everything that has a name: entry points become Plugin records, and a name becomes a function.

Listing reads the metadata of installed packages and imports nothing. A plugin is imported only when somebody names it,
in every process, and an error message then names the distribution that it comes from. Options of a plugin are the
keyword parameters of its function. The contract for authors is plugins/README.md. This module does not need torch.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from dtrain.errors import PluginError, UsageError, nearest
from dtrain.settings.values import Unfit, value_of

Kind = Literal["architecture", "optimizer", "schedule", "dataset", "tracker"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OURS = "dtrain"
LOCAL = "local"  # stands for the version where a plugin is a file that was named on the command line
UNKNOWN = "unknown"  # stands for the name or version of a distribution whose metadata cannot be read
# What the trainer itself gives to a plugin's function, and what therefore is no option of it.
PASSED = ("num_classes", "in_channels", "image_size", "param_groups", "lr", "data_dir")


@dataclass(frozen=True)
class Plugin:
    """Where a name leads: to a distribution, and to the `module:attribute` in it that is the function.

    member: which member of a family is meant; "*" for the family itself, "" for what is no family.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    member: str = ""

    @property
    def said(self) -> str:
        """The plugin as an error message names it: kind, name, distribution, version and where its function stands."""
        return f"{spoken(self.kind)} {self.name} of {self.distribution} {self.version} ({self.value})"


def spoken(kind: str) -> str:
    """The kind in plain English."""
    return "data set" if kind == "dataset" else kind


def listed(kind: Kind) -> list[Plugin]:
    """Every installed plugin of a kind, sorted by name, a family as `family/*`. Reads metadata and imports nothing."""
    single = [_plugin(kind, entry, entry.name) for entry in _entries(f"dtrain.{kind}s")]
    families = [
        replace(_plugin(kind, entry, f"{entry.name}/*"), member="*") for entry in _entries(f"dtrain.{kind}_families")
    ]
    return sorted({*single, *families}, key=lambda p: (p.name, p.distribution))


def find(kind: Kind, name: str) -> Plugin:
    """The plugin that `name` means: a bare name, `distribution::name`, `family/name` or `./file.py:function`.

    A name that comes with dtrain keeps its meaning whatever else is installed. Raises PluginError, all without an
    import, for a name that nobody offers (with the nearest one), for a name that two other distributions offer (with
    both full names), and for a plugin that needs a package which is not installed.
    """
    if is_file(name):
        return Plugin(kind, name, Path(name.rpartition(":")[0]).name, LOCAL, name)
    plugin = _chosen(kind, name, listed(kind))
    for extra, package in _needed(plugin):
        try:  # not find_spec: a folder of that name in the working directory would satisfy it
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise PluginError(
                f"{spoken(kind)} {name} needs the package {package}, which is not installed; "
                f"pip install '{plugin.distribution}[{extra}]'"
            ) from None
    return plugin


def is_file(name: str) -> bool:
    """Whether a name has the form `./file.py:function`."""
    return ".py:" in name


def offered(kind: Kind, name: str) -> bool:
    """Whether some installed package offers a plugin under `name`; a file named with its function counts too."""
    return is_file(name) or bool(_matching(name, listed(kind)))


def identity(plugin: Plugin) -> str:
    """What a run was made with: distribution and version, or the name of a file and a digest of its content."""
    if plugin.version != LOCAL:
        return f"{plugin.distribution} {plugin.version}"
    with contextlib.suppress(OSError):
        content = Path(plugin.value.rpartition(":")[0]).read_bytes()
        return f"{plugin.distribution} {hashlib.sha256(content).hexdigest()[:12]}"
    return plugin.distribution  # the file is gone, so it could not be loaded either


def load(plugin: Plugin) -> Callable[..., Any]:
    """Import a plugin and return its function. Raises PluginError, naming distribution and cause, if that fails.

    What the import prints goes to stderr, since stdout may be read by a program, and a change of the working directory
    is undone, since paths on the command line are relative to it.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), contextlib.chdir("."):
            target = _import_file(plugin.value) if plugin.version == LOCAL else _import(plugin.value)
            members = list(target.names()) if plugin.member else []
    except (Exception, SystemExit) as error:
        raise PluginError(f"{plugin.said} could not be imported: {type(error).__name__}: {error}") from error
    if plugin.member:
        if plugin.member not in members:
            family = plugin.name.removesuffix(f"/{plugin.member}")
            raise PluginError(
                f"{spoken(plugin.kind)} {plugin.name}: not in the family {family}; {nearest(plugin.member, members)}"
            )
        return functools.partial(target.build, plugin.member)
    if not callable(target):
        raise PluginError(f"{plugin.said} is of type {type(target).__name__}, not a function; see plugins/README.md")
    function: Callable[..., Any] = target
    return function


def _matching(asked: str, plugins: Sequence[Plugin]) -> list[Plugin]:
    """The plugins that `asked` may mean: those of exactly this name, else of this distribution, else of this family."""
    if exact := [p for p in plugins if p.name == asked and not p.member]:
        return exact  # also where the author put "/" or "::" into the name
    scope, scoped, bare = asked.partition("::") if "::" in asked else ("", "", asked)
    within = [p for p in plugins if not scoped or _same(p.distribution, scope)]
    family, _, member = bare.partition("/")
    single = [p for p in within if p.name == bare and not p.member]
    return single or [replace(p, name=bare, member=member) for p in within if p.member and p.name == f"{family}/*"]


def _chosen(kind: str, asked: str, plugins: Sequence[Plugin]) -> Plugin:
    """The one of `plugins` that `asked` means. Raises PluginError where it means none or several."""
    found = _matching(asked, plugins)
    ours = [p for p in found if p.distribution == OURS]
    if len(found) > 1 and not ours:
        both = " and ".join(f"{p.distribution}::{p.name}" for p in found)
        raise PluginError(f"{spoken(kind)} {asked!r} is offered more than once, as {both}; give one of these")
    if not found:
        names = [f"{p.distribution}::{p.name}" if "::" in asked else p.name for p in plugins]
        raise PluginError(f"{spoken(kind)} {asked!r} is not installed; {nearest(asked, names)}")
    return (ours or found)[0]


def _same(distribution: str, other: str) -> bool:
    """Whether two spellings name one distribution, by the rule of the package index."""
    return re.sub(r"[-_.]+", "-", distribution).lower() == re.sub(r"[-_.]+", "-", other).lower()


def _entries(group: str) -> list[importlib.metadata.EntryPoint]:
    """The entry points of a group. A distribution whose metadata cannot be read offers nothing and harms nobody."""
    try:
        return list(importlib.metadata.entry_points(group=group))
    except Exception:  # one damaged file fails the call for all distributions, so ask them one by one
        found: list[importlib.metadata.EntryPoint] = []
        for distribution in importlib.metadata.distributions():
            with contextlib.suppress(Exception):
                found += distribution.entry_points.select(group=group)
        return found


def _plugin(kind: str, entry: importlib.metadata.EntryPoint, name: str) -> Plugin:
    distribution, version = UNKNOWN, UNKNOWN
    with contextlib.suppress(Exception):  # metadata without a name or a version, or not UTF-8
        if entry.dist is not None:
            distribution, version = entry.dist.name or UNKNOWN, entry.dist.version or UNKNOWN
    return Plugin(kind, name, distribution, version, entry.value)


def _needed(plugin: Plugin) -> Iterable[tuple[str, str]]:
    """The packages that a plugin needs beside its distribution, each with the extra that installs it.

    An entry point says so itself: `wandb = package.module:Class [extra]`.
    """
    extras = re.findall(r"[\w.-]+", plugin.value.partition("[")[2])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in (importlib.metadata.requires(plugin.distribution) or ()) if extras else ():
            package, _, marker = line.partition(";")
            # a condition beside the extra, such as on Python's version, is left to pip
            extra = re.sub(r"[\s'\"()]", "", marker).removeprefix("extra==")
            if extra in extras and (name := re.match(r"[\w.-]+", package)):
                yield extra, name.group()


def _import(value: str) -> Any:
    module, _, attribute = value.partition("[")[0].strip().partition(":")
    if not attribute:
        raise ImportError("its entry point names no function; write module:function")
    target: Any = importlib.import_module(module.strip())
    for part in attribute.strip().split("."):
        target = getattr(target, part)
    return target


def _import_file(value: str) -> Any:
    text, _, attribute = value.rpartition(":")
    path = Path(text).resolve()
    # the module's name is unique, so that ./torch.py or two files called net.py do not take each other's place
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
    """The parameters of a plugin's function that a user may set: keyword-only ones, and others that have a default."""
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
    """Whether a function has a parameter `name` of its own.

    What **options would swallow does not count: the function that it is passed on to may know nothing of it.
    """
    return name in inspect.signature(function).parameters


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of the parameter `name`; None if there is no such parameter or it has no default."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def parse_options(function: Callable[..., Any], pairs: Mapping[str, str], *, what: str) -> dict[str, Any]:
    """The values of options given as text, converted by the annotations of the function, or by its defaults.

    what: names the plugin in an error. Raises UsageError for an option that the function does not take, with the
    nearest that it does, and for text that is not of the option's type.
    """
    known = options_of(function)
    hints, parameters = _hints(function), inspect.signature(function).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    values = {}
    for name, text in pairs.items():
        if name not in known and (not open_ended or name in PASSED or name in parameters):
            raise UsageError(f"{what} has no option {name!r}; {nearest(name, known)}")
        default = known[name].default if name in known else inspect.Parameter.empty
        plain = type(default) if isinstance(default, bool | int | float) else str
        try:
            values[name] = value_of(hints.get(name, plain), text)
        except Unfit as error:
            raise UsageError(f"{what}: {name}={text}: {error}") from None
    return values


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's parameters, by name; of a class, those of its constructor.

    An annotation that only a type checker can evaluate is left out.
    """
    while isinstance(function, functools.partial):
        function = function.func
    code: Any = function.__init__ if inspect.isclass(function) else function
    code = code if inspect.isroutine(code) else type(code).__call__
    try:
        return get_type_hints(code)
    except Exception:  # a name imported under TYPE_CHECKING fails the call for all, so take them one by one
        scope = getattr(code, "__globals__", {})
        return {name: hint for name, text in inspect.get_annotations(code).items() if (hint := _evaluated(text, scope))}


def _evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, scope)  # as typing.get_type_hints does; the text is the plugin's own code
    except Exception:
        return None


# -- recipes ---------------------------------------------------------------------------------------------------------


def recipes() -> list[Plugin]:
    """Every recipe of every package, sorted by name; `value` is the path of its file. Imports and reads nothing."""
    found = set()
    for entry in _entries("dtrain.recipes"):
        folder = _folder_of(entry.value)
        for path in folder.glob("*.toml") if folder is not None else ():
            found.add(replace(_plugin("recipe", entry, path.stem), value=str(path)))
    return sorted(found, key=lambda p: (p.name, p.distribution))


def find_recipe(name: str) -> Plugin:
    """The recipe that `name` or `distribution::name` means, by the rules of `find`. Raises PluginError."""
    return _chosen("recipe", name, recipes())


def recipe_for(arch: str, dataset: str) -> str | None:
    """The recipe of an architecture's own package for it: `<arch>-<dataset>`, else `<arch>`, else None."""
    try:
        owner = find("architecture", arch)
    except PluginError:
        return None  # the error is raised where the architecture is used
    offered = {p.name for p in recipes() if p.distribution == owner.distribution}
    name = next((name for name in (f"{owner.name}-{dataset}", owner.name) if name in offered), None)
    return name if name is None or owner.distribution == OURS else f"{owner.distribution}::{name}"


def read_recipe(recipe: Plugin) -> dict[str, Any]:
    """The settings in a recipe's file, without its text `about`. Raises PluginError if it cannot be read as TOML."""
    try:
        settings = tomllib.loads(Path(recipe.value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"recipe {recipe.name} of {recipe.distribution} cannot be read: {error}") from None
    settings.pop("about", None)
    return settings


def _folder_of(package: str) -> Path | None:
    # asking for the spec of `package.recipes` would run package/__init__.py, asking for that of `package` does not
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *rest)
