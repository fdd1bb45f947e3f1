"""The reader without FFCV: it maps a beton into memory. The processes of a host share the pages of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from dtrain.data.batch import Slot
from dtrain.data.beton import Beton


class MemoryReader:
    """A `Reader` of betons whose images are stored raw; `open_loader` gives it no others.

    A slot is the whole file, and where in it the images of the batch begin: nothing is copied here.
    """

    def __init__(self, beton: Beton, batches: Iterable[npt.NDArray[np.int64]], largest: int) -> None:
        self._flat = np.memmap(beton.path, np.uint8, "r")
        self._beton, self._batches = beton, iter(batches)

    def __iter__(self) -> Iterator[Slot]:
        for indices in self._batches:
            yield self._flat, self._beton.pixel_offsets[indices]

    def close(self) -> None:
        """Do nothing: this reader has no threads."""
