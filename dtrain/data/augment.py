"""What happens to a training image: decided by keys in a small table, done by one compiled kernel.

Order of operations, fixed: crop of the stored image, shift (black outside of what is stored), gray where one channel is
wanted, flip left to right, cutout (a square set to the mean), normalisation. Deciding is numpy on [n, 5] integers;
moving pixels is integer arithmetic and a table of 256 values a channel, so every back end gives equal bits.
Legend: n images, H, W, C channels of what comes out; stored images have a side and a depth of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from dtrain.keyed import Stream, integers, key

Table = npt.NDArray[np.int32]

# ITU-R BT.601's luma of red, green and blue, in units of 2^-16 as Pillow has them; they add up to 2^16
LUMA = (19595, 38470, 7471)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images. shift: pixels each way; cutout: side of the square in pixels, 0 for none."""

    seed: int
    flip: bool
    shift: int
    cutout: int


def decide(
    augmentation: Augmentation, epoch: int, indices: npt.NDArray[np.int64], size: int, stored: int | None = None
) -> Table:
    """The decisions for samples `indices` in `epoch`: int32 [n, 5] of flip (0 or 1), dy, dx, cutout's top and left.

    A key of (seed, stream, epoch, sample, n) each: of the sample, not of its place in a batch. size: H = W; stored: the
    side of the stored images, in which the crop moves, if it is larger. dy, dx: where in the stored image the first row
    and column come from, so crop and shift together.
    """
    seed, table = augmentation.seed, np.zeros((len(indices), 5), dtype=np.int32)
    samples, room = indices.astype(np.uint64), (stored or size) - size
    if augmentation.flip:
        table[:, 0] = integers(key(seed, Stream.FLIP, epoch, samples, 0), 2)
    for axis in (0, 1):
        if room:
            table[:, 1 + axis] = integers(key(seed, Stream.CROP, epoch, samples, axis), room + 1)
        if augmentation.shift:
            drawn = integers(key(seed, Stream.SHIFT, epoch, samples, axis), 2 * augmentation.shift + 1)
            table[:, 1 + axis] += (drawn - augmentation.shift).astype(np.int32)
        if augmentation.cutout:
            table[:, 3 + axis] = integers(
                key(seed, Stream.CUTOUT, epoch, samples, axis), max(1, size - augmentation.cutout + 1)
            )
    return table


def centred(count: int, size: int, stored: int) -> Table:
    """The table of an evaluation: the middle of each stored image, and nothing else."""
    table = np.zeros((count, 5), dtype=np.int32)
    table[:, 1:3] = (stored - size) // 2
    return table


def lookup_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: str) -> npt.NDArray[Any]:
    """What each byte becomes, [C, 256]: (v / 255 - mean) / std in float32, and that rounded to float16 or bfloat16.

    So a batch in a short type is the float32 batch, cast. The short types are carried as the uint16 of their bits:
    numpy has no bfloat16, which is rounded to nearest even here, and numba's compiler no float16.
    """
    values: npt.NDArray[Any] = (
        (np.arange(256)[None, :] / 255 - np.array(mean)[:, None]) / np.array(std)[:, None]
    ).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    elif dtype == "float16":
        values = values.astype(np.float16).view(np.uint16)
    return values


@njit(nogil=True, cache=True)
def luma(red: int, green: int, blue: int) -> int:
    """The gray of a colour, rounded; of equal red, green and blue just that value."""
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 32768) >> 16


@njit(nogil=True, cache=True)
def move_pixels(  # noqa: C901 - one pass over an image's rows, kept in one place for the compiler
    source: Any, offsets: Any, side: int, depth: int, table: Any, cutout: int, lut: Any, out: Any
) -> None:
    """Write augmented, normalised images. Compiled; takes no lock of Python's; images are independent.

    source: uint8, flat; offsets: uint64 [n], where each image of `side` x `side` x `depth` begins in it; table: int32
    [n, 5] of `decide`; lut: [C, 256]; out: [n, H, W, C] of lut's type, overwritten whole. C is `depth`, or 1 out of 3.
    """
    n, height, width, channels = out.shape
    for i in range(n):
        base = np.int64(offsets[i])
        flip, dy, dx = table[i, 0], np.int64(table[i, 1]), np.int64(table[i, 2])
        # columns of the shifted image that have a source; none where the shift is wider than the image
        low, high = min(width, max(0, -dx)), max(0, min(width, side - dx))
        for y in range(height):
            row = y + dy
            if row < 0 or row >= side:
                low_here, high_here = width, width
            else:
                low_here, high_here = low, high
            for x in range(low_here):
                for c in range(channels):
                    out[i, y, width - 1 - x if flip else x, c] = lut[c, 0]
            at = base + (row * side + low_here + dx) * depth
            if channels == depth:
                for x in range(low_here, high_here):
                    to = width - 1 - x if flip else x
                    for c in range(channels):
                        out[i, y, to, c] = lut[c, source[at + c]]
                    at += channels
            else:
                for x in range(low_here, high_here):
                    to = width - 1 - x if flip else x
                    out[i, y, to, 0] = lut[0, luma(source[at], source[at + 1], source[at + 2])]
                    at += depth
            for x in range(high_here, width):
                for c in range(channels):
                    out[i, y, width - 1 - x if flip else x, c] = lut[c, 0]
        for y in range(table[i, 3], min(table[i, 3] + cutout, height)):
            for x in range(table[i, 4], min(table[i, 4] + cutout, width)):
                for c in range(channels):
                    out[i, y, x, c] = 0
