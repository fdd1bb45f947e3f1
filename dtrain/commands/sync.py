"""`dtrain sync RUN`: what a tracker missed, sent from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtrain.commands.show import print_table
from dtrain.errors import StorageError
from dtrain.run.tracking import sync


def sync_run(run: Path, names: Sequence[str], *, as_json: bool) -> None:
    """Sync and print a row for each tracker. Raises StorageError if one of them could not take all rows."""
    results = sync(run, names)
    print_table("trackers", results, as_json=as_json)
    for result in results:
        if result["error"] is not None:
            raise StorageError(f"{result['tracker']}: {result['error']}; nothing is lost: run it again")
