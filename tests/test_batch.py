"""Claims about the contract between loader and model: the model needs nothing else of the data's rooms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dtrain.model

HEAVY = ("numba", "llvmlite", "PIL", "ffcv", "dtrain.data.loader", "dtrain.data.beton")


def test_the_model_imports_neither_the_loader_nor_its_compiler_nor_an_image_library() -> None:
    rooms = sorted(f"dtrain.model.{path.stem}" for path in Path(dtrain.model.__file__ or "").parent.glob("[!_]*.py"))
    code = f"import sys, {', '.join(rooms)}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (len(rooms) > 5, done.stdout.strip(), done.stderr) == (True, "[]", "")
