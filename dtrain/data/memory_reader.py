"""Images out of a beton that is mapped into memory, without FFCV: the pages are shared by all processes of a host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from dtrain.data.batch import Slot
from dtrain.data.beton import Beton


class MemoryReader:
    """One stream of slots for given batches of sample indices; a slot is (flat uint8, where each image begins).

    Of betons that are stored raw: `open_loader` lets no other come here.
    """

    def __init__(self, beton: Beton, batches: Iterable[npt.NDArray[np.int64]], largest: int) -> None:
        self._flat = np.memmap(beton.path, np.uint8, "r")
        self._beton, self._batches = beton, iter(batches)

    def __iter__(self) -> Iterator[Slot]:
        for indices in self._batches:
            yield self._flat, self._beton.pixel_offsets[indices]

    def close(self) -> None:
        """Nothing runs, so nothing is to be ended."""
