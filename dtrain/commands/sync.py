"""`dtrain sync RUN`: sends a tracker the rows of metrics.jsonl that it has not received."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtrain.commands.show import print_table
from dtrain.errors import StorageError
from dtrain.run.tracking import sync


def sync_run(run: Path, names: Sequence[str], *, as_json: bool) -> None:
    """Send a run to trackers and print a row for each. Raises StorageError if a tracker did not take all rows."""
    results = sync(run, names)
    print_table("trackers", results, as_json=as_json)
    for result in results:
        if result["error"] is not None:
            raise StorageError(f"{result['tracker']}: {result['error']}; nothing is lost: run it again")
