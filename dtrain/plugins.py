"""Finds and loads plugins: everything that has a name on the command line, dtrain's own included.

Plugins are found through Python's entry points. Listing them reads the metadata of installed packages and imports
nothing. A plugin is imported only when a user names it, in every process, and an error message then names the
distribution that it comes from. The options of a plugin are the keyword parameters of its function. plugins/README.md
is the contract for authors. This module does not need torch.
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
LOCAL = "local"  # in place of a version, for a plugin that is a file named on the command line
UNKNOWN = "unknown"  # in place of the name or version of a distribution whose metadata cannot be read
# Parameters that the trainer passes to a plugin's function itself, so a user cannot set them as options.
PASSED = ("num_classes", "in_channels", "image_size", "param_groups", "lr", "data_dir")


@dataclass(frozen=True)
class Plugin:
    """A plugin: its kind and name, the distribution that offers it, and where its function is.

    value: the function's `module:attribute`, or `./file.py:function`; for a recipe, the path of its file.
    member: the name of the member of a family that is meant; "*" for the family itself, "" for any other plugin.
    """

    kind: str
    name: str
    distribution: str
    version: str
    value: str
    member: str = ""

    @property
    def said(self) -> str:
        """The plugin in words for an error message: kind, name, distribution, version and where its function is."""
        return f"{spoken(self.kind)} {self.name} of {self.distribution} {self.version} ({self.value})"


def spoken(kind: str) -> str:
    """A kind in words for a message: "data set" for "dataset", any other unchanged."""
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

    A name that comes with dtrain keeps its meaning whatever else is installed. Nothing is imported. Raises PluginError
    for a name that no package offers (and suggests one), for a name that several other distributions offer (and gives
    their full names), and for a plugin that needs a package which is not installed.
    """
    if is_file(name):
        return Plugin(kind, name, Path(name.rpartition(":")[0]).name, LOCAL, name)
    plugin = _chosen(kind, name, listed(kind))
    for extra, package in _needed(plugin):
        try:  # not find_spec, which a folder of that name in the working directory would satisfy
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
    """Whether an installed package offers a plugin called `name`; true for every `./file.py:function`."""
    return is_file(name) or bool(_matching(name, listed(kind)))


def identity(plugin: Plugin) -> str:
    """The version of a plugin, as recorded with a run: distribution and version, or a file's name and digest."""
    if plugin.version != LOCAL:
        return f"{plugin.distribution} {plugin.version}"
    with contextlib.suppress(OSError):
        content = Path(plugin.value.rpartition(":")[0]).read_bytes()
        return f"{plugin.distribution} {hashlib.sha256(content).hexdigest()[:12]}"
    return plugin.distribution  # the file cannot be read; loading it will fail and say so


def load(plugin: Plugin) -> Callable[..., Any]:
    """Import a plugin and return its function. Raises PluginError, with the distribution and the cause, if that fails.

    What the import prints goes to stderr, because stdout may be read by a program. If the import changes the working
    directory, the change is undone, because paths on the command line are relative to it.
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
    """The plugins that `asked` may mean.

    They are those with exactly this name; else those of the named distribution with the rest as their name; else
    members of a family.
    """
    if exact := [p for p in plugins if p.name == asked and not p.member]:
        return exact  # even if its author has put "/" or "::" into the name
    scope, scoped, bare = asked.partition("::") if "::" in asked else ("", "", asked)
    within = [p for p in plugins if not scoped or _same(p.distribution, scope)]
    family, _, member = bare.partition("/")
    single = [p for p in within if p.name == bare and not p.member]
    return single or [replace(p, name=bare, member=member) for p in within if p.member and p.name == f"{family}/*"]


def _chosen(kind: str, asked: str, plugins: Sequence[Plugin]) -> Plugin:
    """The one of `plugins` that `asked` means. Raises PluginError if it means none or several."""
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
    """Whether two names mean the same distribution: case, "-", "_" and "." do not matter, as on PyPI."""
    return re.sub(r"[-_.]+", "-", distribution).lower() == re.sub(r"[-_.]+", "-", other).lower()


def _entries(group: str) -> list[importlib.metadata.EntryPoint]:
    """The entry points of a group. A distribution whose metadata cannot be read is skipped."""
    try:
        return list(importlib.metadata.entry_points(group=group))
    except Exception:  # one damaged metadata file makes the call fail for all, so ask each distribution on its own
        found: list[importlib.metadata.EntryPoint] = []
        for distribution in importlib.metadata.distributions():
            with contextlib.suppress(Exception):
                found += distribution.entry_points.select(group=group)
        return found


def _plugin(kind: str, entry: importlib.metadata.EntryPoint, name: str) -> Plugin:
    distribution, version = UNKNOWN, UNKNOWN
    with contextlib.suppress(Exception):  # the metadata may lack a name or a version, or not be UTF-8
        if entry.dist is not None:
            distribution, version = entry.dist.name or UNKNOWN, entry.dist.version or UNKNOWN
    return Plugin(kind, name, distribution, version, entry.value)


def _needed(plugin: Plugin) -> Iterable[tuple[str, str]]:
    """The optional packages that a plugin needs, as (extra, package): the extra of its distribution installs them.

    The entry point of the plugin names its extras: `wandb = package.module:Class [extra]`.
    """
    extras = re.findall(r"[\w.-]+", plugin.value.partition("[")[2])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in (importlib.metadata.requires(plugin.distribution) or ()) if extras else ():
            package, _, marker = line.partition(";")
            # a requirement with a further condition, such as on Python's version, is left to pip and not checked here
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
    # the module gets a unique name, so that ./torch.py does not hide torch and two files called net.py do not collide
    name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module of a class there
    sys.path.insert(0, str(path.parent))  # so that the file can import others in its folder, as a script can
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
    """Whether a function declares a parameter called `name`.

    A parameter like **options does not count: the function to which the options are passed on may not know the name.
    """
    return name in inspect.signature(function).parameters


def default_of(function: Callable[..., Any], name: str) -> Any:
    """The default of the parameter `name`; None if there is no such parameter or it has no default."""
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def parse_options(function: Callable[..., Any], pairs: Mapping[str, str], *, what: str) -> dict[str, Any]:
    """Convert options given as text to values, by the annotations of the function or the types of its defaults.

    what: the plugin in words, for errors. Raises UsageError for an option that the function does not have, with a
    suggestion, and for a text that cannot be converted to the option's type.
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
    """The annotated types of a function's parameters, by name; for a class, those of its constructor.

    Annotations that cannot be evaluated at run time are left out.
    """
    while isinstance(function, functools.partial):
        function = function.func
    code: Any = function.__init__ if inspect.isclass(function) else function
    code = code if inspect.isroutine(code) else type(code).__call__
    try:
        return get_type_hints(code)
    except Exception:  # a name imported under TYPE_CHECKING makes the call fail for all parameters, so try each
        scope = getattr(code, "__globals__", {})
        return {name: hint for name, text in inspect.get_annotations(code).items() if (hint := _evaluated(text, scope))}


def _evaluated(annotation: Any, scope: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, scope)  # as typing.get_type_hints does; the text comes from the plugin's own code
    except Exception:
        return None


# -- recipes ---------------------------------------------------------------------------------------------------------


def recipes() -> list[Plugin]:
    """Every recipe of every package, sorted by name; `value` is the path of its file. Imports no package."""
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
    """The default recipe of an architecture, from its own package: `<arch>-<dataset>`, else `<arch>`, else None."""
    try:
        owner = find("architecture", arch)
    except PluginError:
        return None  # the error is raised where the architecture is used
    offered = {p.name for p in recipes() if p.distribution == owner.distribution}
    name = next((name for name in (f"{owner.name}-{dataset}", owner.name) if name in offered), None)
    return name if name is None or owner.distribution == OURS else f"{owner.distribution}::{name}"


def read_recipe(recipe: Plugin) -> dict[str, Any]:
    """The settings in a recipe's file, without `about`, its description. Raises PluginError if it is not valid TOML."""
    try:
        settings = tomllib.loads(Path(recipe.value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PluginError(f"recipe {recipe.name} of {recipe.distribution} cannot be read: {error}") from None
    settings.pop("about", None)
    return settings


def _folder_of(package: str) -> Path | None:
    # find_spec("package.recipes") would run package/__init__.py; find_spec("package") does not
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)), *rest)
