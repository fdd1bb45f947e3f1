"""`dtrain bench overhead`: compares a full training run with a bare loop on one batch that stays in memory.

One process is compared with one bare loop, and two processes with two bare loops that run at the same time. Every
process has one thread.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from dtrain.run.rows import TrainRow
from dtrain.run.rundir import read_rows
from dtrain_bench.processes import output_of
from dtrain_bench.ratios import ratios, show

BATCH, WARMUP = 128, 4  # images of one process in a step; steps before the measurement begins


def trainer_rate(steps: int, processes: int) -> float:
    """Images per CPU-second and process of a training run on synthetic images, from its first to its last log row.

    The CPU time is that of rank 0, which the rows hold; the other ranks do the same work.
    """
    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder:
        output = Path(folder) / "run"
        flags = "--arch allcnn_c --arch-opt norm=batch --recipe none --dataset synthetic --flip --shift 2 --cutout 8"
        flags += f" --opt sgd --momentum 0.9 --nesterov --lr 0.01 --batch-size {BATCH * processes}"
        flags += f" --steps {WARMUP + steps} --threads 1 --device cpu --nproc {processes} --output {output}"
        flags += f" --log-interval {WARMUP} --eval-every end --checkpoint-every end"
        output_of([sys.executable, "-m", "dtrain", "train", *flags.split()])
        rows = [row for row in read_rows(output) if isinstance(row, TrainRow)]
        images = (rows[-1].samples - rows[0].samples) / processes
        return images / (rows[-1].clock.cpu_seconds - rows[0].clock.cpu_seconds)


def bare_rate(steps: int, processes: int) -> float:
    """The mean images per CPU-second of `processes` bare loops that run at the same time."""
    command = [sys.executable, "-m", "dtrain_bench.bare", *map(str, (BATCH, steps, WARMUP, 1))]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes - 1)]
    rates = [float(output_of(command)), *(float(other.communicate()[0]) for other in others)]
    return sum(rates) / processes


def main(*, quick: bool, as_json: bool) -> None:
    """Measure and print. quick: two short turns, to try it out."""
    turns, steps = (2, 4) if quick else (9, 40)
    results = {
        name: ratios(partial(trainer_rate, steps, processes), partial(bare_rate, steps, processes), turns=turns)
        for name, processes in (("one process", 1), ("two processes", 2))
    }
    show("overhead", results, "images per CPU-second", as_json=as_json)
