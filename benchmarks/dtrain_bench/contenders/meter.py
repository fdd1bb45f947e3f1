"""Measures real time and CPU time of a script's steps after a warm-up, with its loader processes included."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def tree_cpu_seconds(root: int) -> float:
    """CPU seconds used so far by a process and all its descendants, including those that have ended.

    For each process that /proc lists, it adds the process's own time and that of the children it has waited for. A
    child that has ended but was not waited for is still listed, so the sum never decreases, and running workers are
    counted. Processes that were orphaned and adopted by init are missed. Resolution 10 ms; takes some milliseconds.
    """
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError:  # the process has just ended
            continue
        fields = text.rpartition(")")[2].split()  # from field 3 on; field 2, the name, may itself contain ")" or spaces
        parents[int(path.parent.name)] = int(fields[1])
        seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) / TICKS_PER_SECOND  # utime, stime, cutime, cstime
    tree, frontier = set(), {root}
    while frontier:
        tree |= frontier
        frontier = {pid for pid, parent in parents.items() if parent in frontier} - tree
    return sum(seconds.get(pid, 0.0) for pid in tree)


class Meter:
    """Counts steps, and reads the clocks only twice: after the warm-up and after the last step."""

    def __init__(self, warmup: int, steps: int, batch_size: int) -> None:
        self._warmup, self._steps, self._batch_size = warmup, steps, batch_size
        self._done = 0
        self._losses: list[Tensor] = []
        self._clocks: list[tuple[float, float]] = []

    def count(self, loss: Tensor) -> bool:
        """Count a step and keep its loss, without a read of the value. Returns True after the last step."""
        self._done += 1
        if self._done > self._warmup:
            self._losses.append(loss.detach())
        if self._done in (self._warmup, self._warmup + self._steps):
            self._clocks.append((time.perf_counter(), tree_cpu_seconds(os.getpid())))
        return self._done == self._warmup + self._steps

    def report(self) -> str:
        """The images per second and per CPU-second of the timed steps, and their mean loss, as a line of JSON."""
        (wall, cpu), (wall_after, cpu_after) = self._clocks
        images = self._steps * self._batch_size
        rates = {
            "images_per_second": images / (wall_after - wall),
            "images_per_cpu_second": images / (cpu_after - cpu),
            "loss": float(torch.stack(self._losses).float().mean()),
        }
        return json.dumps(rates)
