"""Being moved: the names of dtrain/settings/values.py, for the rooms that still ask for them here."""

from __future__ import annotations

from typing import Any

from dtrain.settings.values import Every, Span, flag_of


def parse_every(value: Any, flag: str, *, clock: bool) -> Every:
    return value if isinstance(value, Every) else Every.parse(value)


def parse_seconds(value: Any, flag: str) -> float:
    return (value if isinstance(value, Span) else Span.parse(value)).seconds


__all__ = ["Every", "flag_of", "parse_every", "parse_seconds"]
