"""Measures two ways of doing the same in turns, and gives the ratios of their rates with median and quartiles."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from dtrain.run.rundir import environment


def machine() -> dict[str, Any]:
    """The facts about the machine that belong to every measurement: processor, cores, load, versions."""
    versions = {name: metadata.version(name) for name in ("dtrain", "torch", "numpy")}
    return {
        "processor": environment()["processor"],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        **versions,
    }


def ratios(ours: Callable[[], float], theirs: Callable[[], float], *, turns: int) -> dict[str, Any]:
    """Measure both rates `turns` times, in alternating order, and compare the pairs as `compared` does."""
    pairs = []
    for turn in range(turns):
        if turn % 2:
            second, first = theirs(), ours()
        else:
            first, second = ours(), theirs()
        pairs.append((first, second))
    return compared(pairs)


def compared(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """For pairs (ours, theirs): the median of each side, and the median, quartiles and range of the ratios."""
    values = sorted(a / b for a, b in pairs)
    quartiles = statistics.quantiles(values, n=4) if len(values) > 2 else [values[0], values[0], values[-1]]
    return {
        "turns": len(pairs),
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio_median": statistics.median(values),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "ratio_range": [values[0], values[-1]],
    }


def show(title: str, results: dict[str, dict[str, Any]], unit: str, *, as_json: bool) -> None:
    """Print results with the facts about the machine, as lines or as JSON."""
    if as_json:
        print(json.dumps({"benchmark": title, "unit": unit, "machine": machine(), "results": results}, indent=1))
        return
    print(f"{title}, {unit}; {machine()}")
    for name, r in results.items():
        low, high = r["ratio_quartiles"]
        print(
            f"  {name}: {r['ours']:,.0f} against {r['theirs']:,.0f}, ratio {r['ratio_median']:.3f} "
            f"[quartiles {low:.3f}, {high:.3f}; n = {r['turns']}]"
        )
