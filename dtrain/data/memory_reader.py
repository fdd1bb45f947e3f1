"""The reader that does without FFCV: it maps a beton into memory, where all processes of a host share its pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from dtrain.data.batch import Slot
from dtrain.data.beton import Beton


class MemoryReader:
    """A `Reader` for betons whose images are stored raw; `open_loader` uses it for no others.

    A slot is the whole mapped file with the offsets of the images of the batch, so nothing is copied here.
    """

    def __init__(self, beton: Beton, batches: Iterable[npt.NDArray[np.int64]], largest: int) -> None:
        self._flat = np.memmap(beton.path, np.uint8, "r")
        self._beton, self._batches = beton, iter(batches)

    def __iter__(self) -> Iterator[Slot]:
        for indices in self._batches:
            yield self._flat, self._beton.pixel_offsets[indices]

    def close(self) -> None:
        """Do nothing: this reader has no threads."""
