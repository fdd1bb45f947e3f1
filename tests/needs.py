"""What some machines lack. Where CI is set nothing that `make test` installs may be missing: a skip would hide it."""

from __future__ import annotations

import importlib.util
import os

import pytest


def need_ffcv() -> None:
    """Skip where FFCV is not installed, as after a set-up that could not build it; fail where CI is set."""
    if importlib.util.find_spec("ffcv") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("FFCV is not installed")
