"""What a run prints: a progress bar on a terminal, plain lines, and a table at the end. Rank 0 alone prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from dtrain.run.rows import Best, EvalRow, TrainRow

T = TypeVar("T")
CELL = 30  # the most characters of a cell in `three_ways`, so that three cells and a name fit on a line


class Console:
    """Prints if it is `enabled`. Ranks other than 0 have one that is not, so that callers need not check the rank."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._drawn = enabled and sys.stdout.isatty()

    def line(self, text: str) -> None:
        """Print one line on standard output, above the progress bar where there is one."""
        with suppress(OSError):  # a full disk or a closed pipe must not end the run
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            elif self.enabled:
                print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print one line of warning on standard error."""
        if self.enabled:
            with suppress(OSError):
                print(f"warning: {text}", file=sys.stderr, flush=True)

    def start(self, total_steps: int, step: int) -> None:
        """Draw the progress bar of a run if this is a terminal."""
        if self._drawn:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=step)
            self._bar.start()

    def stop(self) -> None:
        """Remove the progress bar."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with suppress(OSError):
                bar.stop()

    def train(self, row: TrainRow, total_epochs: float, total_steps: int) -> None:
        """Print a train row: progress, loss, accuracy, learning rate, speed, time spent waiting for data, time left."""
        if self._bar is not None:
            self._bar.update(self._task, completed=row.step)
        clock = row.clock
        self.line(
            f"epoch {row.epoch:.2f}/{total_epochs:.4g}  step {row.step}/{total_steps}  loss {row.loss:.4f}  "
            f"acc {100 * row.top1_fraction:.2f} %  lr {row.lr:.3g}  {clock.images_per_second:.0f} images/s  "
            f"wait {100 * clock.data_wait_fraction:.1f} %  left {span(clock.left_seconds)}"
        )

    def evaluation(self, row: EvalRow) -> None:
        """Print an eval row: counts and percent."""
        weights = "" if row.weights == "raw" else f" ({row.weights} weights)"
        self.line(
            f"{row.split} at step {row.step}{weights}: {counted(row.hits, row.images)}, "
            f"top-5 {counted(row.hits5, row.images)}, loss {row.loss:.4f}"
        )

    def converting(self, progress: Generator[Any, None, T]) -> T:
        """Run a conversion to its end and return its result. Shows a bar on a terminal, else a line for each split."""
        bar, tasks = None, {}
        try:
            while True:
                step = next(progress)
                if self._drawn:
                    if bar is None:
                        from rich.progress import Progress

                        bar = Progress()
                        bar.start()
                    if step.split not in tasks:
                        tasks[step.split] = bar.add_task(f"converting {step.split}", total=step.total)
                    bar.update(tasks[step.split], completed=step.done)
                elif step.done == step.total:
                    self.line(f"converted {step.split}: {step.total} images")
                for text in step.told:
                    self.warn(text)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            if bar is not None:
                with suppress(OSError):
                    bar.stop()

    def finished(
        self, evaluations: Sequence[EvalRow], best: Best | None, seconds: Mapping[str, float], run: Path
    ) -> None:
        """The table at the end of a run. evaluations: the last row of each kind of weights."""
        rows = [(f"{row.split} accuracy, {row.weights} weights", counted(row.hits, row.images)) for row in evaluations]
        if best is not None and best.hits > max((row.hits for row in evaluations), default=0):
            note = ", picked on the test split: no fair figure" if best.split == "test" else ""
            rows.append((f"best, at step {best.step}{note}", counted(best.hits, best.images)))
        look = ("look at it", f"dtrain eval {shlex.quote(shown(run))}")
        self.table("finished", [*rows, *_where(seconds, run), look])

    def stopped(self, seconds: Mapping[str, float], run: Path, again: str) -> None:
        """The table of a run that has stopped. again: the command that continues it."""
        self.table("stopped", [*_where(seconds, run), ("to go on", again)])

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print two columns under a title."""
        for line in (f"\n{title}", *(f"  {line}" for line in aligned(rows))):
            self.line(line)


def aligned(rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a plain table. rows: of equal length; their columns are two spaces apart."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _where(seconds: Mapping[str, float], run: Path) -> list[tuple[str, str]]:
    times = ", ".join(f"{kind} {span(value)}" for kind, value in seconds.items())
    return [("time", times), ("run directory", shown(run))]


def three_ways(rows: Iterable[tuple[str, Any, Any, Any]]) -> str:
    """A table of what a resume would change. rows: the setting, its old value, the new value, the value used."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    cut = [[cell if len(cell) <= CELL else cell[: CELL - 3] + "..." for cell in line] for line in texts]
    return "\n".join(aligned([("setting", "was", "asked", "used"), *cut]))


def counted(hits: int, images: int) -> str:
    """Hits as a fraction and in percent: `9031/10000 = 90.31 %`."""
    return f"{hits}/{images} = {100 * hits / max(1, images):.2f} %"


def shown(path: Path) -> str:
    """A path as a user would type it: relative if it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def span(seconds: float) -> str:
    """A duration in words: 45 s, 2 min 10 s, 1 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
