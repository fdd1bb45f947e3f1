"""What the data loader hands to the model, and what a reader hands to the loader.

This is the contract between `dtrain.data` and `dtrain.model`. It imports nothing but numpy and torch, so that the model
can be imported without the loader, its compiler (numba) and its image libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Slot = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]


@dataclass(frozen=True)
class Batch:
    """The images of one step, or of one chunk of an evaluation, ready for the network. The memory is never reused.

    images: [b, C, H, W], float32 or the autocast type, normalised; channels-last memory unless the loader was told
    otherwise. labels: class numbers, int64 [b]; or, where images are mixed, a weight for each of the K classes,
    float32 [b, K], each row adding up to 1. indices: int64 [b], the sample numbers in the file. checksum: int64 [], a
    hash of the indices and of every
    augmentation decision, below b x 2^32; the checksums of all processes add up to that of the global batch.
    copied: on CUDA, the event that marks the end of the copy to the device; `Loader.batch` makes the current stream
    wait for it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    checksum: Tensor
    copied: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Request:
    """Which samples one batch is made of, and how.

    indices: sample numbers, int64 [b]. epoch: the epoch for which the augmentation is drawn; None for no augmentation.
    image_size: side in pixels to which the images are shrunk at the end; None for the loader's own image size.
    """

    indices: npt.NDArray[np.int64]
    epoch: int | None
    image_size: int | None = None


class Reader(Protocol):
    """Yields the stored bytes of one batch after the other, for the sample numbers that the reader was opened with.

    A slot is (flat uint8 bytes, uint64 [b] offsets at which each image begins). It is valid until the next slot is
    requested. A reader may use threads of its own; the order and the bytes do not depend on them, and an error in one
    of them is raised in the thread that iterates.
    """

    def __iter__(self) -> Iterator[Slot]:
        """Yield one slot for each batch of sample numbers, in order."""
        ...

    def close(self) -> None:
        """End every thread of the reader; it may be abandoned in the middle of its batches."""
        ...
