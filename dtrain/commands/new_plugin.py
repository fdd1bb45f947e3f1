"""`dtrain plugins new NAME`: creates a plugin package from the template in dtrain_zoo."""

from __future__ import annotations

import importlib.util
import keyword
import re
import tempfile
from pathlib import Path

from dtrain.errors import StorageError, UsageError
from dtrain.plugins import offered

TEMPLATE_NAME = "my_net"  # the template is a working package of this name


def new_plugin(name: str, into: Path) -> Path:
    """Create the package `name` in the folder `into`, completely or not at all, and return its path.

    Raises UsageError if Python cannot import a package of that name, or if a folder in `into`, an installed package or
    an installed architecture already has it; StorageError if the folder cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(f"plugins new {name}: give a name that Python can import, such as my_net")
    if (into / name).exists():
        raise UsageError(f"plugins new {name}: {into / name} is already there; give another name")
    if importlib.util.find_spec(name) is not None:
        raise UsageError(f"plugins new {name}: a package of that name is already installed; give another name")
    if offered("architecture", name):
        raise UsageError(f"plugins new {name}: an architecture of that name is already installed; give another name")
    zoo = importlib.util.find_spec("dtrain_zoo")  # found, not imported
    template = Path(next(iter(zoo.submodule_search_locations or ()))) / "template" if zoo else Path("template")
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=into) as beside:
            folder = Path(beside) / name
            for source in sorted(template.rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    target = folder / str(source.relative_to(template)).replace(TEMPLATE_NAME, name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    text = source.read_text(encoding="utf-8").replace(TEMPLATE_NAME, name)
                    target.write_text(text, encoding="utf-8")
            folder.rename(into / name)
    except OSError as error:
        raise StorageError(f"cannot create {into / name}: {error.strerror}; give a folder that is writable") from error
    return into / name


def next_steps(package: Path) -> str:
    """The text that is printed after a package has been created: the commands to install, test and train it."""
    name = package.name
    return "\n".join(
        [
            f"{package} is a package with one architecture; its code is {package / name / '__init__.py'}",
            f"  pip install --no-deps {package}    (with --editable while you work on it)",
            f"  python -m pytest {package}",
            f"  dtrain train --arch {name} --dataset digits --dry-run",
        ]
    )
