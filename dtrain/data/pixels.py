"""Carries out on pixels what `augment.py` has decided, by kernels that numba compiles and that release the GIL.

`write_images` is the entry point. If only crop, shift, flip and cutout are in use, one pass leads from the stored bytes
to normalised images. Otherwise the kernels follow one another on uint8 images, in blocks of images that fit into the
processor's cache. Normalisation looks each byte up in a table of 256 values for each channel.

Legend: n images; H, W, C: height, width and channels of the output. Stored pictures are squares with a side and a depth
(number of channels) of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from dtrain.data.augment import ONE, RECORDS, Decisions, Place
from dtrain.data.beton import LUMA

HALF = ONE // 2  # added before a right shift by 16 bits, it rounds halves up
BLOCK_BYTES = 256 << 10  # size of a block of images between two kernels; fits the usual second-level cache


def lookup_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: str) -> npt.NDArray[Any]:
    """The normalised value of each byte, [C, 256]: (v / 255 - mean) / std in float32, or that rounded to a short type.

    dtype: float32, float16 or bfloat16. Rounding is to nearest, ties to even, so a batch in a short type equals the
    float32 batch after a cast. Short types are returned as their bits, in uint16, because numpy has no bfloat16 and
    numba's compiler has no float16.
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


def write_images(
    source: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.uint64],
    side: int,
    depth: int,
    decisions: Decisions,
    lut: npt.NDArray[Any],
    out: npt.NDArray[Any],
    *,
    size: int | None = None,
) -> None:
    """Write augmented, normalised images to `out`. An image depends on no other one but its partner.

    source: flat bytes. offsets: [n], where each picture of `side` x `side` x `depth` begins in it. lut: [C, 256], from
    `lookup_table`. out: [n, H, H, C] of lut's type, overwritten completely; C is `depth`, or 1 for the luma of pictures
    of depth 3. size: the image size for which the decisions were drawn, by default H; if it is larger than H, the
    images are shrunk to H.
    """
    d, (count, small, _, channels) = decisions, out.shape
    size = size or small
    if d.maps is None and not d.tables and size == small:
        move_pixels(source, offsets, side, depth, d.moves, d.cutout, lut, out)
        return
    bytes_as_they_are = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 256)).copy()
    per_block = max(1, BLOCK_BYTES // (size * size * channels) // 2) * 2  # even, so that partners stay together
    images = np.empty((min(per_block, count), size, size, channels), dtype=np.uint8)
    shrunk = images if size == small else np.empty((len(images), small, small, channels), dtype=np.uint8)
    for first in range(0, count, per_block):
        block = slice(first, min(first + per_block, count))
        here, now, seen = d.of(block), images[: block.stop - first], shrunk[: block.stop - first]
        if here.maps is None:
            move_pixels(source, offsets[block], side, depth, here.moves, 0, bytes_as_they_are, now)
        else:
            sample_pixels(source, offsets[block], side, depth, here.maps, now)
        for record in RECORDS:
            if record.place is Place.BYTES and record.name in here.tables:
                globals()[record.kernel](here.tables[record.name], now)
        if size != small:
            shrink_pixels(now, seen)
        normalise_pixels(seen, lut, out[block])
        if here.cutout:
            square = np.full((len(now), 2), here.cutout, dtype=np.int32)
            blank_pixels(shrunk_rectangles(np.concatenate((here.moves[:, 3:5], square), 1), size, small), out[block])
        for record in RECORDS:
            if record.place is Place.BLANK and record.name in here.tables:
                blank_pixels(shrunk_rectangles(here.tables[record.name], size, small), out[block])


def shrunk_rectangles(rectangles: npt.NDArray[np.int32], size: int, small: int) -> npt.NDArray[np.int32]:
    """Rectangles, int32 [n, 4] of top, left, height, width, scaled from images of side `size` to side `small`.

    What lies outside of the image is cut off; then the four edges are scaled and rounded, halves up.
    """
    if size == small:
        return rectangles
    corners, sides = rectangles[:, :2].astype(np.int64), rectangles[:, 2:]
    begin, end = ((2 * small * np.minimum(edge, size) + size) // (2 * size) for edge in (corners, corners + sides))
    return np.concatenate((begin, end - begin), axis=1).astype(np.int32)


@njit(nogil=True, cache=True)
def luma(red: Any, green: Any, blue: Any) -> int:
    """The gray value of a colour, rounded. If red, green and blue are equal, it is the same value."""
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + HALF) >> 16  # type: ignore[no-any-return]  # of Any


@njit(nogil=True, cache=True)
def move_pixels(  # noqa: C901 - one loop, so that the compiler sees all of it
    source: Any, offsets: Any, side: int, depth: int, moves: Any, cutout: int, lut: Any, out: Any
) -> None:
    """Crop, shift, conversion to gray, flip, normalisation and cutout in one pass; see `write_images` and Decisions."""
    n, height, width, channels = out.shape
    for i in range(n):
        base = np.int64(offsets[i])
        flip, dy, dx = moves[i, 0], np.int64(moves[i, 1]), np.int64(moves[i, 2])
        # the columns of the shifted image that are stored; there are none if the shift is wider than the image
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
        for y in range(moves[i, 3], min(moves[i, 3] + cutout, height)):
            for x in range(moves[i, 4], min(moves[i, 4] + cutout, width)):
                for c in range(channels):
                    out[i, y, x, c] = 0


@njit(nogil=True, cache=True)
def sample_pixels(source: Any, offsets: Any, side: int, depth: int, maps: Any, out: Any) -> None:
    """Write bytes sampled bilinearly at the places that `maps` gives (see Decisions), rounded to 1/256 of a pixel.

    A place within half a pixel of the picture's edge has the value of the edge; outside of the picture everything is
    black. A map that moves by whole pixels gives the same bytes as `move_pixels`.
    """
    n, height, width, channels = out.shape
    end, last, line = side * 256 - 128, side - 1, side * depth
    for i in range(n):
        image = source[np.int64(offsets[i]) :]
        for y in range(height):
            x_at, y_at = maps[i, 1] * y + maps[i, 2] + 128, maps[i, 4] * y + maps[i, 5] + 128
            for x in range(width):
                px, py = x_at >> 8, y_at >> 8
                x_at += maps[i, 0]
                y_at += maps[i, 3]
                if px < -128 or px >= end or py < -128 or py >= end:
                    for c in range(channels):
                        out[i, y, x, c] = 0
                    continue
                column, row = px >> 8, py >> 8
                left, right = max(column, 0) * depth, min(column + 1, last) * depth
                upper, lower = max(row, 0) * line, min(row + 1, last) * line
                to_right, down = px & 255, py & 255
                both = to_right * down
                weights = 65536 - ((to_right + down) << 8) + both, (to_right << 8) - both, (down << 8) - both, both
                # unsigned, since numba checks signed indices for negative values, which halves the speed
                places = (
                    np.uint64(upper + left),
                    np.uint64(upper + right),
                    np.uint64(lower + left),
                    np.uint64(lower + right),
                )
                red = _between(image, places, weights, np.uint64(0))
                if depth == 1:
                    out[i, y, x, 0] = red
                    continue
                green = _between(image, places, weights, np.uint64(1))
                blue = _between(image, places, weights, np.uint64(2))
                if channels == 1:
                    out[i, y, x, 0] = luma(red, green, blue)
                else:
                    out[i, y, x, 0], out[i, y, x, 1], out[i, y, x, 2] = red, green, blue


@njit(nogil=True, cache=True)
def _between(image: Any, places: Any, weights: Any, channel: Any) -> int:
    a, b, c, d = places
    of_a, of_b, of_c, of_d = weights
    upper = of_a * image[a + channel] + of_b * image[b + channel]
    return (upper + of_c * image[c + channel] + of_d * image[d + channel] + HALF) >> 16  # type: ignore[no-any-return]  # of Any


@njit(nogil=True, cache=True)
def _blended(value: Any, other: Any, share: Any) -> int:
    """The weighted mean of `value`, with the weight `share` / ONE, and `other`, rounded and clipped to 0..255.

    The share may be larger than ONE; the weight of `other` is then negative.
    """
    return min(max((value * share + other * (ONE - share) + HALF) >> 16, 0), 255)  # type: ignore[no-any-return]  # of Any


@njit(nogil=True, cache=True)
def jitter_pixels(factors: Any, images: Any) -> None:
    """Change brightness, then contrast, then saturation, in place.

    Each value is blended with black, then with the mean luma of its image, then with the luma of its pixel. factors:
    int32 [n, 3] in units of 1 / ONE. images: uint8 [n, H, W, C]; with one channel, saturation changes nothing.
    """
    n, height, width, channels = images.shape
    tone = np.empty(256, np.int64)
    for i in range(n):
        brightness, contrast, saturation = np.int64(factors[i, 0]), np.int64(factors[i, 1]), np.int64(factors[i, 2])
        for v in range(256):
            tone[v] = _blended(v, 0, brightness)
        if contrast != ONE:
            total = 0
            for y in range(height):
                for x in range(width):
                    total += _luma_of(tone, images[i, y, x])
            pixels = height * width
            mean = (total + pixels // 2) // pixels
            for v in range(256):
                tone[v] = _blended(tone[v], mean, contrast)
        for y in range(height):
            for x in range(width):
                gray = _luma_of(tone, images[i, y, x])
                for c in range(channels):
                    images[i, y, x, c] = _blended(tone[images[i, y, x, c]], gray, saturation)


@njit(nogil=True, cache=True)
def _luma_of(tone: Any, pixel: Any) -> int:
    if len(pixel) == 1:
        return tone[pixel[0]]  # type: ignore[no-any-return]  # of Any
    return luma(tone[pixel[0]], tone[pixel[1]], tone[pixel[2]])


@njit(nogil=True, cache=True)
def mix_pixels(mixtures: Any, images: Any) -> None:
    """Blend the two images of each pair (mixup), or exchange a rectangle between them (cutmix), in place.

    mixtures: int64 [n, 6], the table of the record "mix". images: uint8 [n, H, W, C] with n even.
    """
    n, height, width, channels = images.shape
    for i in range(0, n, 2):
        own, top, left = mixtures[i, 1], mixtures[i, 2], mixtures[i, 3]
        high, wide = mixtures[i, 4], mixtures[i, 5]
        a, b = images[i], images[i + 1]
        if high:
            for y in range(top, top + high):
                for x in range(left, left + wide):
                    for c in range(channels):
                        a[y, x, c], b[y, x, c] = b[y, x, c], a[y, x, c]
        else:
            for y in range(height):
                for x in range(width):
                    for c in range(channels):
                        first, second = np.int64(a[y, x, c]), np.int64(b[y, x, c])
                        a[y, x, c], b[y, x, c] = _blended(first, second, own), _blended(second, first, own)


@njit(nogil=True, cache=True)
def shrink_pixels(images: Any, out: Any) -> None:
    """Shrink images by area: each pixel of `out` is the mean of the part of the image that it covers.

    images: uint8 [n, S, S, C]; out: uint8 [n, s, s, C], s <= S <= 4096. In units of 1 / s of an input pixel, row y of
    the output covers [y S, (y + 1) S) and row j of the input covers [j s, (j + 1) s). The weight of a row is the length
    of the overlap, and columns likewise. Weighted sums are integers; they are divided by S x S and rounded, halves up.
    """
    n, size, _, channels = images.shape
    small = out.shape[1]
    rows = np.empty(size * channels, np.int32)  # one row of `out`, before its columns are summed
    area = np.int64(size) * size
    half, inverse = area // 2, 1.0 / area
    begin, end = np.empty(small, np.int64), np.empty(small, np.int64)  # the input rows or columns that each one covers
    for y in range(small):
        begin[y], end[y] = y * size // small, ((y + 1) * size - 1) // small + 1
    for i in range(n):
        image = images[i].reshape(size, size * channels)
        for y in range(small):
            rows[:] = 0
            for j in range(begin[y], end[y]):
                weight = np.int32(min((y + 1) * size, (j + 1) * small) - max(y * size, j * small))
                line = image[j]
                for k in range(size * channels):
                    rows[k] += weight * np.int32(line[k])
            for x in range(small):
                for c in range(channels):
                    total = half
                    for j in range(begin[x], end[x]):
                        weight = min((x + 1) * size, (j + 1) * small) - max(x * size, j * small)
                        total += np.int64(rows[j * channels + c]) * weight
                    # This is total // area, exactly, and several times faster than a division: (total + 1/2) / area is
                    # at least 1 / (2 area) away from any whole number, and the product in double precision is more
                    # accurate than that where total is below 2^33.
                    out[i, y, x, c] = np.uint8(np.int64((total + 0.5) * inverse))


@njit(nogil=True, cache=True)
def normalise_pixels(images: Any, lut: Any, out: Any) -> None:
    """Write the values that lut [C, 256] gives for the bytes `images` [n, H, W, C] to `out`, of the same shape."""
    n, height, width, channels = images.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                for c in range(channels):
                    out[i, y, x, c] = lut[c, images[i, y, x, c]]


@njit(nogil=True, cache=True)
def blank_pixels(rectangles: Any, out: Any) -> None:
    """Set a rectangle of each normalised image to the mean, which is 0.

    rectangles: int32 [n, 4] of top, left, height, width in pixels; what lies outside of the image is ignored.
    """
    n, height, width, channels = out.shape
    for i in range(n):
        top, left, high, wide = rectangles[i, 0], rectangles[i, 1], rectangles[i, 2], rectangles[i, 3]
        for y in range(top, min(top + high, height)):
            for x in range(left, min(left + wide, width)):
                for c in range(channels):
                    out[i, y, x, c] = 0
