"""Claims about pixels: moved, sampled, jittered and mixed as a few lines of Python's own integers say, to the bit."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dtrain.data.augment import ONE, Augmentation, Decisions, decide, undecided
from dtrain.data.pixels import (
    jitter_pixels,
    lookup_table,
    mix_pixels,
    move_pixels,
    sample_pixels,
    shrink_pixels,
    shrunk_rectangles,
    write_images,
)
from dtrain.keyed import Stream, key

Pixels = npt.NDArray[np.uint8]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10, as published
BYTES = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 256)).copy()  # each as it is


def moves(*asked: Any) -> npt.NDArray[np.int32]:
    return decide(*asked).moves


def reference(
    image: Pixels, row: list[int], cutout: int, lut: npt.NDArray[Any], size: int | None = None
) -> npt.NDArray[Any]:
    """One augmented, normalised image [H, W, C]: shift with black outside, flip, normalise, cutout to the mean, 0."""
    flip, dy, dx, top, left = row
    side = image.shape[0]
    size = size or side
    shifted = np.zeros((size, size, image.shape[2]), np.uint8)
    for y in range(size):
        for x in range(size):
            if 0 <= y + dy < side and 0 <= x + dx < side:
                shifted[y, x] = image[y + dy, x + dx]
    if flip:
        shifted = shifted[:, ::-1]
    out = np.stack([lut[channel][shifted[..., channel]] for channel in range(image.shape[2])], axis=2)
    if cutout:
        out[top : top + cutout, left : left + cutout] = 0
    return out


def moved(
    images: Pixels, table: npt.NDArray[np.int32], cutout: int, lut: npt.NDArray[Any], size: int | None = None
) -> npt.NDArray[Any]:
    count, side, _, depth = images.shape
    size = size or side
    # between guards, so that a pixel that is written outside is seen
    guarded = np.full((count + 2, size, size, len(lut)), 7, lut.dtype)
    offsets = np.arange(count, dtype=np.uint64)[::-1] * np.uint64(side * side * depth)
    flat = np.ascontiguousarray(images[::-1]).reshape(-1)
    move_pixels(flat, offsets, side, depth, table, cutout, lut, guarded[1:-1])
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()
    return guarded[1:-1]


def images_of(count: int, size: int = 8, channels: int = 3) -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def test_a_2_by_2_image_is_moved_as_worked_out_by_hand() -> None:
    image = np.array([[10, 20], [30, 40]], np.uint8).reshape(1, 2, 2, 1)
    lut = np.arange(1, 257, dtype=np.float32)[None]  # black is 1 here, so that it differs from the cutout's 0

    def out(*row: int, cutout: int = 0) -> list[list[float]]:
        result: list[list[float]] = moved(image, np.array([row], np.int32), cutout, lut)[0, ..., 0].tolist()
        return result

    assert out(0, 0, 0, 0, 0) == [[11, 21], [31, 41]]
    assert out(1, 0, 0, 0, 0) == [[21, 11], [41, 31]]
    assert out(0, 1, 0, 0, 0) == [[31, 41], [1, 1]]  # what was a row below is here
    assert out(0, 0, -1, 0, 0) == [[1, 11], [1, 31]]  # what was a column to the left is here
    assert out(1, 0, -1, 0, 0) == [[11, 1], [31, 1]]  # the flip comes after the shift
    assert out(1, 0, 0, 0, 1, cutout=1) == [[21, 0], [41, 31]]  # and the cutout after the flip
    assert out(0, 1, 1, 1, 1, cutout=1) == [[41, 1], [1, 0]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("flip", "shift", "cutout"), [(True, 3, 4), (False, 0, 0), (True, 0, 0), (False, 8, 1)])
def test_pixels_move_as_in_numpy(flip: bool, shift: int, cutout: int, dtype: str) -> None:
    images, lut = images_of(60), lookup_table(MEAN, STD, dtype)
    table = moves(Augmentation(flip=flip, shift=shift, cutout=cutout), 5, 1, np.arange(60), 8)
    out = moved(images, table, cutout, lut)
    for i in range(60):
        assert np.array_equal(out[i], reference(images[i], table[i].tolist(), cutout, lut))


@pytest.mark.parametrize("dx", [-25, -9, -8, 8, 9, 25])
@pytest.mark.parametrize("dy", [-9, 0, 9])
@pytest.mark.parametrize("flip", [0, 1])
def test_a_shift_wider_than_the_image_gives_black_and_writes_nothing_outside(flip: int, dy: int, dx: int) -> None:
    images, lut = images_of(1), lookup_table(MEAN, STD, "float32")
    out = moved(images, np.array([[flip, dy, dx, 0, 0]], np.int32), 0, lut)
    assert np.array_equal(out[0], np.broadcast_to(lut[:, 0], (8, 8, 3)))


def test_a_cutout_larger_than_the_image_is_the_whole_image() -> None:
    images, lut = images_of(3), lookup_table(MEAN, STD, "float32")
    table = moves(Augmentation(cutout=9), 0, 0, np.arange(3), 8)
    assert not moved(images, table, 9, lut).any()


def test_gray_images_have_one_channel() -> None:
    images, lut = images_of(10, channels=1), lookup_table((0.5,), (0.25,), "float32")
    table = moves(Augmentation(flip=True, shift=2, cutout=3), 0, 0, np.arange(10), 8)
    out = moved(images, table, 3, lut)
    for i in range(10):
        assert np.array_equal(out[i], reference(images[i], table[i].tolist(), 3, lut))


@pytest.mark.parametrize(("side", "shift"), [(9, 0), (13, 4), (13, 9)])
def test_a_crop_moves_inside_the_stored_image_and_a_shift_shows_black_only_outside_of_it(side: int, shift: int) -> None:
    images, lut = images_of(60, size=side), lookup_table(MEAN, STD, "float32")
    table = moves(Augmentation(flip=True, shift=shift, cutout=2), 3, 4, np.arange(60), 8, side)
    out = moved(images, table, 2, lut, size=8)
    for i in range(60):
        assert np.array_equal(out[i], reference(images[i], table[i].tolist(), 2, lut, size=8))


@pytest.mark.parametrize(("side", "corner"), [(8, 0), (9, 0), (10, 1), (13, 2)])
def test_an_evaluation_takes_the_middle(side: int, corner: int) -> None:
    images, lut = images_of(2, size=side), lookup_table(MEAN, STD, "float32")
    out = moved(images, undecided(2, 8, side).moves, 0, lut, size=8)
    for i in range(2):
        middle = images[i, corner : corner + 8, corner : corner + 8]
        assert np.array_equal(out[i], reference(middle, [0, 0, 0, 0, 0], 0, lut))


def test_one_channel_of_three_is_luma_and_equal_channels_are_that_value() -> None:
    lut = np.arange(256, dtype=np.float32)[None]
    # 0.299 R + 0.587 G + 0.114 B of BT.601, by hand: 76.245, 149.685, 29.07, 123.65, 255
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [100, 150, 50], [255, 255, 255]], np.uint8)
    out = moved(colours.reshape(5, 1, 1, 3), np.zeros((5, 5), np.int32), 0, lut)
    assert out.ravel().tolist() == [76, 150, 29, 124, 255]
    grays = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 1, 1, 3)
    assert moved(grays, np.zeros((256, 5), np.int32), 0, lut).ravel().tolist() == list(range(256))


def test_gray_pixels_move_as_coloured_ones_do() -> None:
    images, table = (
        images_of(40, size=11),
        moves(Augmentation(flip=True, shift=4, cutout=3), 5, 1, np.arange(40), 8, 11),
    )
    lut = lookup_table((0.5,), (0.25,), "float32")
    weighed = images.astype(np.int64) @ np.array([19595, 38470, 7471])
    gray = ((weighed + 32768) // 65536).astype(np.uint8)[..., None]
    assert np.array_equal(moved(images, table, 3, lut, size=8), moved(gray, table, 3, lut, size=8))


# -- places between pixels ---------------------------------------------------------------------------------------------


def sampled_by_hand(image: Pixels, row: list[int], size: int) -> Pixels:
    """What stands at the places of one map, in fractions: bilinear, edges go on for half a pixel, black beyond."""
    side, _, depth = image.shape
    out = np.zeros((size, size, depth), np.uint8)
    for y in range(size):
        for x in range(size):
            # to the nearest 1/256 of a pixel, halves up
            u, v = (
                Fraction(floor((Fraction(p * x + q * y + r, ONE) + Fraction(1, 512)) * 256), 256)
                for p, q, r in (row[:3], row[3:])
            )
            if not (-Fraction(1, 2) <= u < side - Fraction(1, 2) and -Fraction(1, 2) <= v < side - Fraction(1, 2)):
                continue
            for c in range(depth):
                total = Fraction(0)
                for at_y in (floor(v), floor(v) + 1):
                    for at_x in (floor(u), floor(u) + 1):
                        pixel = int(image[min(max(at_y, 0), side - 1), min(max(at_x, 0), side - 1), c])
                        total += pixel * (1 - abs(v - at_y)) * (1 - abs(u - at_x))
                out[y, x, c] = floor(total + Fraction(1, 2))
    return out


def sampled(images: Pixels, maps: npt.NDArray[np.int64], size: int, channels: int | None = None) -> Pixels:
    count, side, _, depth = images.shape
    guarded = np.full((count + 2, size, size, channels or depth), 7, np.uint8)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(side * side * depth)
    sample_pixels(images.reshape(-1), offsets, side, depth, maps, guarded[1:-1])
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()
    return guarded[1:-1]


def test_a_2_by_2_image_is_sampled_as_worked_out_by_hand() -> None:
    image = np.array([[10, 20], [30, 41]], np.uint8).reshape(1, 2, 2, 1)

    def out(*row: float, size: int = 2) -> list[list[int]]:
        maps = np.array([[round(ONE * number) for number in row]], np.int64)
        result: list[list[int]] = sampled(image, maps, size)[0, ..., 0].tolist()
        return result

    assert out(1, 0, 0, 0, 1, 0) == [[10, 20], [30, 41]]
    assert out(-1, 0, 1, 0, 1, 0) == [[20, 10], [41, 30]]  # flipped
    assert out(0, 1, 0, -1, 0, 1) == [[30, 10], [41, 20]]  # a quarter of a turn, clockwise
    assert out(-1, 0, 1, 0, -1, 1) == [[41, 30], [20, 10]]  # half a turn
    assert out(1, 0, 0.25, 0, 1, 0) == [[13, 20], [33, 41]]  # 12.5 and 32.75; the last column goes on for half a pixel
    assert out(1, 0, 0.5, 0, 1, 0) == [[15, 0], [36, 0]]  # 35.5; half a pixel past the last column is outside
    assert out(1, 0, -0.5, 0, 1, 0) == [[10, 15], [30, 36]]  # half a pixel before the first is inside
    assert out(1, 0, 0, 0, 1, -0.75) == [[0, 0], [15, 25]]  # 0.75 x 10 + 0.25 x 30; 25.25
    assert out(1, 0, 1 / 1024, 0, 1, 0) == [[10, 20], [30, 41]]  # less than half of 1/256 of a pixel
    # twice as large: places -1/4, 1/4, 3/4, 5/4
    assert out(0.5, 0, -0.25, 0, 0.5, -0.25, size=4)[0] == [10, 13, 18, 20]
    # half as large: the mean of all four, 25.25
    assert out(2, 0, 0.5, 0, 2, 0.5, size=1) == [[25]]


@pytest.mark.parametrize("channels", [1, 3])
def test_any_map_samples_as_fractions_do(channels: int) -> None:
    rng = np.random.default_rng(0)
    images = images_of(12, size=7, channels=channels)
    maps = rng.integers(-2 * ONE, 2 * ONE, (12, 6))
    maps[:, [2, 5]] = rng.integers(-4 * ONE, 10 * ONE, (12, 2))
    maps[6:, [0, 4]], maps[6:, [1, 3]] = rng.integers(ONE // 2, ONE, (2, 6, 2))  # and some that mostly look inside
    out = sampled(images, maps, 6)
    assert 0.1 < (out == 0).mean() < 0.9
    for i in range(12):
        assert np.array_equal(out[i], sampled_by_hand(images[i], maps[i].tolist(), 6))


def test_maps_of_whole_pixels_give_the_bits_of_the_fast_way() -> None:
    images = images_of(60, size=11)
    for shift in (0, 3, 20):
        augmentation = Augmentation(flip=True, shift=shift, affine=(0.0, 0.0, 0.0, 0.0))
        decisions = decide(augmentation, 3, 4, np.arange(60), 8, 11)
        assert decisions.maps is not None
        assert np.array_equal(sampled(images, decisions.maps, 8), moved(images, decisions.moves, 0, BYTES, size=8))
        gray = moved(images, decisions.moves, 0, BYTES[:1], size=8)
        assert np.array_equal(sampled(images, decisions.maps, 8, channels=1), gray)
    whole = decide(Augmentation(flip=True, scale=(1.0, 1.0)), 3, 4, np.arange(60), 11)
    assert whole.maps is not None
    assert np.array_equal(sampled(images, whole.maps, 11), moved(images, whole.moves, 0, BYTES))


# -- jitter ------------------------------------------------------------------------------------------------------------


def jittered(image: list[Any], *factors: float) -> list[Any]:
    pixels = np.array([image], np.uint8)
    jitter_pixels(np.array([[round(ONE * factor) for factor in factors]], np.int32), pixels)
    result: list[Any] = pixels[0].tolist()
    return result


def test_jitter_is_worked_out_by_hand() -> None:
    gray = [[[10], [100]], [[150], [200]]]  # mean 115
    assert jittered(gray, 1, 1, 1) == gray
    assert jittered(gray, 1.5, 1, 1) == [[[15], [150]], [[225], [255]]]  # 300 is white
    assert jittered(gray, 0, 1, 1) == [[[0], [0]], [[0], [0]]]
    assert jittered(gray, 0.25, 1, 1) == [[[3], [25]], [[38], [50]]]  # 2.5, 37.5: halves up
    assert jittered(gray, 1, 0, 1) == [[[115], [115]], [[115], [115]]]
    assert jittered(gray, 1, 2, 1) == [[[0], [85]], [[185], [255]]]  # -95 and 285
    assert jittered(gray, 1, 1, 0.5) == gray  # one channel has no saturation
    assert jittered(gray, 0.5, 0.5, 1) == [[[32], [54]], [[67], [79]]]  # 5, 50, 75, 100 of mean 57.5, so 58
    colour = [[[200, 100, 50]]]  # luma 59.8 + 58.7 + 5.7 = 124.2
    assert jittered(colour, 1, 1, 0) == [[[124, 124, 124]]]
    assert jittered(colour, 1, 1, 0.5) == [[[162, 112, 87]]]
    assert jittered(colour, 1, 1, 2) == [[[255, 76, 0]]]  # 276, 76, -24
    assert jittered(colour, 1, 0.5, 1) == [[[162, 112, 87]]]  # one pixel is its own mean
    assert jittered([[[80, 80, 80]]], 0.7, 1.3, 0.2) == [[[56, 56, 56]]]  # gray stays gray


def test_each_image_has_its_own_factors() -> None:
    pixels = np.full((3, 2, 2, 1), 100, np.uint8)
    jitter_pixels(np.array([[ONE, ONE, ONE], [ONE // 2, ONE, ONE], [2 * ONE, ONE, ONE]], np.int32), pixels)
    assert pixels[:, 0, 0, 0].tolist() == [100, 50, 200]


# -- mixing ------------------------------------------------------------------------------------------------------------


def test_partners_are_blended_and_exchange_rectangles_as_worked_out_by_hand() -> None:
    images = np.array([[[10, 20], [30, 40]], [[110, 121], [130, 140]]], np.uint8).reshape(2, 2, 2, 1)

    def mixed(own: float, *rectangle: int) -> list[Any]:
        pixels = images.copy()
        mix_pixels(np.array([[5, round(own * ONE), *rectangle]] * 2, np.int64), pixels)
        result: list[Any] = pixels[..., 0].tolist()
        return result

    first, second = images[..., 0].tolist()
    assert mixed(1, 0, 0, 0, 0) == [first, second]
    assert mixed(0, 0, 0, 0, 0) == [second, first]
    assert mixed(0.75, 0, 0, 0, 0) == [[[35, 45], [55, 65]], [[85, 96], [105, 115]]]  # 45.25, 95.75
    assert mixed(0.75, 1, 1, 1, 1) == [[[10, 20], [30, 140]], [[110, 121], [130, 40]]]
    assert mixed(0.5, 0, 0, 2, 1) == [[[110, 20], [130, 40]], [[10, 121], [30, 140]]]
    assert mixed(0, 0, 0, 2, 2) == [second, first]


# -- shrinking ---------------------------------------------------------------------------------------------------------


def shrunk_by_hand(image: Pixels, small: int) -> Pixels:
    """Each pixel that comes out is the exact mean of the square that it covers, in fractions; halves are rounded up."""
    side, _, depth = image.shape
    step = Fraction(side, small)

    def overlaps(at: int) -> list[tuple[int, Fraction]]:
        low, high = at * step, (at + 1) * step
        lengths = ((j, min(high, Fraction(j + 1)) - max(low, Fraction(j))) for j in range(side))
        return [(j, length) for j, length in lengths if length > 0]

    out = np.zeros((small, small, depth), np.uint8)
    for y in range(small):
        for x in range(small):
            for c in range(depth):
                total = sum(a * b * int(image[j, i, c]) for j, a in overlaps(y) for i, b in overlaps(x))
                out[y, x, c] = floor(total / step**2 + Fraction(1, 2))
    return out


def shrunk(images: Pixels, small: int) -> Pixels:
    count, _, _, depth = images.shape
    guarded = np.full((count + 2, small, small, depth), 7, np.uint8)
    shrink_pixels(images, guarded[1:-1])
    assert (guarded[0] == 7).all()
    assert (guarded[-1] == 7).all()
    return guarded[1:-1]


GOLDEN = {16: "564532a8244db1fa", 24: "3f8bcd4a4941ae84", 28: "e49eb7d76163397d"}
SIZES = [(32, 24), (32, 28), (32, 16), (17, 5), (9, 8), (7, 1), (6, 6)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "small"), SIZES)
def test_a_shrunken_pixel_is_the_mean_of_the_area_that_it_covers(size: int, small: int, channels: int) -> None:
    images = images_of(3, size=size, channels=channels)
    images[2] = images[2] // 128 * 255  # black and white
    out = shrunk(images, small)
    for i in range(3):
        assert np.array_equal(out[i], shrunk_by_hand(images[i], small))


def test_pictures_are_shrunk_as_worked_out_by_hand() -> None:
    square = np.array([[10, 20], [30, 41]], np.uint8).reshape(1, 2, 2, 1)
    assert shrunk(square, 1).ravel().tolist() == [25]  # 25.25
    assert shrunk(np.array([[1, 1], [2, 2]], np.uint8).reshape(1, 2, 2, 1), 1).ravel().tolist() == [2]  # 1.5: up
    # three rows become two, each of one and a half: (2 x 30 + 60) / 3, (60 + 2 x 91) / 3 = 80.67
    rows = np.array([30, 60, 91], np.uint8).reshape(1, 3, 1, 1).repeat(3, axis=2)
    assert shrunk(rows, 2)[0, :, :, 0].tolist() == [[40, 40], [81, 81]]


def test_the_largest_pictures_do_not_overflow() -> None:
    white = np.full((1, 4096, 4096, 1), 255, np.uint8)
    assert (shrunk(white, 4095) == 255).all()
    white[0, ::2] = 0
    assert (shrunk(white, 1) == 128).all()  # 127.5


def test_golden_shrunken_pictures_never_change() -> None:
    # as shrunk_by_hand has them
    pictures = (key(0, Stream.SYNTHETIC, np.arange(4 * 32 * 32 * 3)) >> np.uint64(56)).astype(np.uint8)
    seen = {
        small: hashlib.sha256(shrunk(pictures.reshape(4, 32, 32, 3), small).tobytes()).hexdigest()[:16]
        for small in (16, 24, 28)
    }
    assert seen == GOLDEN


def test_rectangles_shrink_with_their_pictures_edge_by_edge() -> None:
    # of 10 pixels to 4: edges at 2.5 and 3.75 of 0.4 pixels each; 0.4 x 3 = 1.2, 0.4 x 7 = 2.8; what is outside is lost
    rectangles = np.array([[3, 0, 4, 10], [1, 1, 0, 5], [0, 5, 1, 9], [0, 0, 99, 99]], np.int32)
    assert shrunk_rectangles(rectangles, 10, 4).tolist() == [[1, 0, 2, 4], [0, 0, 0, 2], [0, 2, 0, 2], [0, 0, 4, 4]]
    assert shrunk_rectangles(rectangles, 10, 10).tolist() == rectangles.tolist()
    # halves up: edges 1 and 3 of 4 pixels are 0.5 and 1.5 of 2
    assert shrunk_rectangles(np.array([[1, 3, 2, 1]], np.int32), 4, 2).tolist() == [[1, 2, 1, 0]]


# -- all together ------------------------------------------------------------------------------------------------------


EVERYTHING = Augmentation(
    flip=True,
    shift=1,
    cutout=2,
    scale=(0.3, 0.9),
    affine=(40.0, 0.1, 0.2, 10.0),
    jitter=(0.4, 0.5, 0.6),
    erase=0.5,
    mixup=0.4,
    cutmix=1.0,
)


def blended(value: int, other: int, share: int) -> int:
    return min(max(floor(Fraction(value * share + other * (ONE - share), ONE) + Fraction(1, 2)), 0), 255)


def luma_by_hand(pixel: list[int]) -> int:
    return (19595 * pixel[0] + 38470 * pixel[1] + 7471 * pixel[2] + 32768) // 65536 if len(pixel) == 3 else pixel[0]


def picture_by_hand(images: Pixels, d: Decisions, size: int, channels: int) -> npt.NDArray[np.int64]:
    """Augmented images in bytes, -1 where they are set to the mean: a step after the other, pixel for pixel."""
    shown = []
    for image, move, row in zip(images, d.moves.tolist(), d.maps if d.maps is not None else d.moves, strict=True):
        if d.maps is not None:
            seen = sampled_by_hand(image, row.tolist(), size)
        else:
            seen = reference(image, [*move[:3], 0, 0], 0, BYTES, size)
        shown.append([[[luma_by_hand(p)] if channels == 1 else p for p in line] for line in seen.tolist()])
    for picture, factors in zip(shown, d.tables["jitter"].tolist() if "jitter" in d.tables else [], strict=False):
        brightness, contrast, saturation = factors
        pixels = [pixel for line in picture for pixel in line]
        for pixel in pixels:
            pixel[:] = [blended(v, 0, brightness) for v in pixel]
        mean = floor(Fraction(sum(map(luma_by_hand, pixels)), len(pixels)) + Fraction(1, 2))
        for pixel in pixels:
            pixel[:] = [blended(v, mean, contrast) for v in pixel]
            pixel[:] = [blended(v, luma_by_hand(pixel), saturation) for v in list(pixel)]
    out = np.array(shown, np.int64)
    before = out.copy()
    for i in range(len(images) if "mix" in d.tables else 0):
        _, own, top, left, height, width = d.tables["mix"][i].tolist()
        if height:
            part = (slice(top, top + height), slice(left, left + width))
            out[i][part] = before[i ^ 1][part]
        else:
            pairs = zip(before[i].ravel().tolist(), before[i ^ 1].ravel().tolist(), strict=True)
            out[i] = np.reshape([blended(a, b, own) for a, b in pairs], out[i].shape)
    for i in range(len(images)):
        top, left = d.moves[i, 3:].tolist()
        out[i, top : top + d.cutout, left : left + d.cutout] = -1
        if "erase" in d.tables:
            top, left, height, width = d.tables["erase"][i].tolist()
            out[i, top : top + height, left : left + width] = -1
    return out


def written(
    images: Pixels, d: Decisions, size: int, lut: npt.NDArray[Any], small: int | None = None
) -> npt.NDArray[Any]:
    count, side, _, depth = images.shape
    small = small or size
    out = np.full((count, small, small, len(lut)), 7, lut.dtype)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(side * side * depth)
    write_images(images.reshape(-1), offsets, side, depth, d, lut, out, size=size)
    return out


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augmentation",
    [
        EVERYTHING,
        Augmentation(flip=True, shift=1, cutout=2, scale=(0.3, 0.9)),
        Augmentation(flip=True, shift=1, affine=(40.0, 0.1, 0.2, 10.0)),
        Augmentation(flip=True, shift=2, jitter=(0.4, 0.5, 0.6)),
        Augmentation(flip=True, cutout=3, erase=0.5),
        Augmentation(shift=1, cutout=2, mixup=0.4),
        Augmentation(cutmix=1.0),
    ],
    ids=["everything", "scale", "affine", "jitter", "erase", "mixup", "cutmix"],
)
def test_images_are_what_one_step_after_the_other_makes_of_them(augmentation: Augmentation, channels: int) -> None:
    images, size = images_of(20, size=10), 8
    lut = lookup_table(MEAN[:channels], STD[:channels], "float32")
    decisions = decide(augmentation, 9, 3, np.arange(100, 120), size, 10)
    by_hand = picture_by_hand(images, decisions, size, channels)
    wanted = np.stack([lut[c][by_hand[..., c]] for c in range(channels)], axis=-1)
    assert np.array_equal(written(images, decisions, size, lut), np.where(by_hand < 0, 0, wanted))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augmentation",
    [EVERYTHING, Augmentation(flip=True, shift=2, cutout=3), Augmentation(erase=1.0), Augmentation()],
    ids=["everything", "moves", "erase", "nothing"],
)
def test_a_stage_shrinks_what_the_full_size_shows_and_its_rectangles(augmentation: Augmentation, channels: int) -> None:
    images, size, small = images_of(20, size=10), 8, 5
    lut = lookup_table(MEAN[:channels], STD[:channels], "float32")
    decisions = decide(augmentation, 9, 3, np.arange(100, 120), size, 10)
    bare = Decisions(decisions.moves, 0, decisions.maps, {n: t for n, t in decisions.tables.items() if n != "erase"})
    out = written(images, decisions, size, lut, small)
    for i, whole in enumerate(picture_by_hand(images, bare, size, channels)):
        picture = shrunk_by_hand(whole.astype(np.uint8), small)
        wanted = np.stack([lut[c][picture[..., c]] for c in range(channels)], axis=-1)
        rectangles = [[*decisions.moves[i, 3:].tolist(), augmentation.cutout, augmentation.cutout]]
        rectangles += [decisions.tables["erase"][i].tolist()] if "erase" in decisions.tables else []
        for top, left, height, width in rectangles:
            rows, columns = ((at, at + length) for at, length in ((top, height), (left, width)))
            (first, last), (begin, end) = (
                [floor(Fraction(edge * small, size) + Fraction(1, 2)) for edge in edges] for edges in (rows, columns)
            )
            wanted[first:last, begin:end] = 0
        assert np.array_equal(out[i], wanted)


def test_golden_pictures_never_change() -> None:
    # as the test above has them step by step; 8 keyed pictures of 10 x 10, seen at 8 x 8, bytes as they are
    pictures = (key(0, Stream.SYNTHETIC, np.arange(8 * 10 * 10 * 3)) >> np.uint64(56)).astype(np.uint8)
    asked = {
        "flip, shift, cutout": Augmentation(flip=True, shift=2, cutout=3),
        "scale": Augmentation(scale=(0.3, 0.9)),
        "affine": Augmentation(affine=(40.0, 0.1, 0.2, 10.0)),
        "jitter": Augmentation(jitter=(0.4, 0.5, 0.6)),
        "erase": Augmentation(erase=0.5),
        "mixup": Augmentation(mixup=0.4),
        "cutmix": Augmentation(cutmix=1.0),
        "everything": EVERYTHING,
    }
    seen = {}
    for name, augmentation in asked.items():
        decisions = decide(augmentation, 9 if name == "everything" else 0, 0, np.arange(8), 8, 10)
        out = written(pictures.reshape(8, 10, 10, 3), decisions, 8, BYTES)
        seen[name] = hashlib.sha256(out.tobytes()).hexdigest()[:16]
    assert seen == {
        "flip, shift, cutout": "51193e7bba784e9e",
        "scale": "070ad66f564724a9",
        "affine": "cf6928493c0fed97",
        "jitter": "2dc5245f6ae54314",
        "erase": "f703fb19b32242ba",
        "mixup": "c975f1ff9a74fe14",
        "cutmix": "dd00c843e07fdb69",
        "everything": "14420864129e1a15",
    }


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    images, lut = images_of(20, size=10), lookup_table(MEAN, STD, "bfloat16")
    decisions = decide(EVERYTHING, 9, 0, np.arange(20), 8, 10)
    wanted = written(images, decisions, 8, lut)
    for images_of_a_block in (0, 3, 6, 19):
        monkeypatch.setattr("dtrain.data.pixels.BLOCK_BYTES", images_of_a_block * 8 * 8 * 3)
        assert np.array_equal(written(images, decisions, 8, lut), wanted)


# -- normalisation ---------------------------------------------------------------------------------------------------


def test_normalisation_is_by_mean_and_deviation() -> None:
    lut = lookup_table((0.0, 0.5, 0.2), (1.0, 0.25, 0.1), "float32")
    assert (lut.shape, lut.dtype) == ((3, 256), np.float32)
    # by hand: (0/255 - 0.5) / 0.25 = -2, (255/255 - 0.5) / 0.25 = 2, (51/255 - 0.2) / 0.1 = 0
    assert [lut[0, 0], lut[0, 255], lut[1, 0], lut[1, 255]] == [0.0, 1.0, -2.0, 2.0]
    assert [float(lut[2, 51]), float(lut[2, 102])] == pytest.approx([0.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (MEAN, STD),
        (MEAN, (1e-3, 1.0, 60.0)),
        ((0.0, 0.0, 1.0), (1 / 765, 1 / 8415, 1 / 765)),  # whole numbers, many of them halfway between two short ones
    ],
)
def test_a_short_type_is_torchs_rounding_of_float32(
    dtype: torch.dtype, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    wanted = torch.from_numpy(lookup_table(mean, std, "float32")).to(dtype)
    bits = torch.from_numpy(lookup_table(mean, std, str(dtype).removeprefix("torch.")))
    assert torch.equal(bits, wanted.view(torch.uint16))
