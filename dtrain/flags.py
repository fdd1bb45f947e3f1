"""Makes the command line's flags from the settings: one option for each, under the heading of its panel in --help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from dtrain.settings.config import SETTINGS
from dtrain.settings.staged import Staged
from dtrain.settings.values import Setting, flag_of

METAVARS = {
    bool: " ",
    int: "N",
    Staged: "N",
    float: "X",
    Path: "PATH",
    tuple[str, ...]: "NAME,NAME",
    dict[str, str]: "K=V",
}


def with_flags(function: Callable[..., None], names: Sequence[str] = tuple(SETTINGS)) -> Callable[..., None]:
    """Turn `function(settings, **own)` into a Typer command that has a flag for each setting in `names`.

    The command has the function's other parameters as options too. `function` receives as `settings` the flags that
    were given, by name and mostly as text; they are converted and checked later, like values from a file.
    """
    hints = get_type_hints(function, include_extras=True)
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name])
        for p in inspect.signature(function).parameters.values()
        if p.name != "settings"
    ]

    def command(**given: Any) -> None:
        extra = {p.name: given.pop(p.name) for p in own}
        function({name: value for name, value in given.items() if value not in (None, [])}, **extra)

    parameters = [*(_parameter(SETTINGS[name]) for name in names), *own]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def own_flag(flag: str, panel: str, text: str, metavar: str = " ", **more: Any) -> Any:
    """A command's flag that is not a setting, shown in --help like those that are."""
    return typer.Option(flag, help=text, rich_help_panel=panel, metavar=metavar, show_default=False, **more)


def _parameter(known: Setting) -> inspect.Parameter:
    flags = list(known.flags) or [flag_of(known.name)]
    annotation: Any = list[str] | None if get_origin(known.kind) is dict else str | None
    if known.kind is bool:
        flags, annotation = [f"{flags[0]}/--no-{flags[0][2:]}"], bool | None
    text = known.help
    if get_origin(known.kind) is Literal:
        text += f"; one of {', '.join(map(str, get_args(known.kind)))}"
    if (shown := _default(known)) is not None:
        text += f" [default: {shown}]"
    option = typer.Option(
        *flags,
        help=text.replace("[", "\\["),  # escaped, because rich would read "[...]" as markup
        rich_help_panel=known.panel.title,
        metavar=METAVARS.get(known.kind, "X,X,X" if get_origin(known.kind) is tuple else "TEXT"),
        show_default=False,
    )
    return inspect.Parameter(
        known.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _default(known: Setting) -> str | None:
    if known.optional or known.default in ("", (), {}):
        return None
    if known.kind is bool:
        return "yes" if known.default else "no"
    return f"{known.default:g}" if known.kind is float else str(known.default)
