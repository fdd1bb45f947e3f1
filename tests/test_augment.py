"""Claims about augmentation: decided by keys, and pixels moved as a few lines of numpy say, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dtrain.data.augment import Augmentation, centred, decide, lookup_table, move_pixels
from dtrain.keyed import Stream, key

Pixels = npt.NDArray[np.uint8]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10, as published


def uniform(n: int, *words: int) -> int:
    """The draw in [0, n) of one key: its high 32 bits times n, over 2^32; in Python's own integers."""
    return (int(key(*words)) >> 32) * n >> 32  # type: ignore[arg-type]


def by_hand(augmentation: Augmentation, epoch: int, sample: int, size: int) -> list[int]:
    """The decisions for one sample, from the hash alone."""
    seed, shift, cutout = augmentation.seed, augmentation.shift, augmentation.cutout
    row = [uniform(2, seed, Stream.FLIP, epoch, sample, 0) if augmentation.flip else 0]
    for axis in (0, 1):
        row.append(uniform(2 * shift + 1, seed, Stream.SHIFT, epoch, sample, axis) - shift if shift else 0)
    for axis in (0, 1):
        row.append(uniform(size - cutout + 1, seed, Stream.CUTOUT, epoch, sample, axis) if cutout else 0)
    return row


# -- decisions -------------------------------------------------------------------------------------------------------


def test_golden_decisions_never_change() -> None:
    # worked out with Python's own integers, from splitmix64 as published
    table = decide(Augmentation(seed=0, flip=True, shift=4, cutout=8), 0, np.arange(4), 32)
    assert table.dtype == np.int32
    assert table.tolist() == [[0, -4, -2, 20, 23], [0, 3, -4, 12, 12], [0, -3, -1, 18, 14], [1, -3, 1, 23, 20]]
    table = decide(Augmentation(seed=17, flip=True, shift=2, cutout=3), 5, np.array([49_999, 0]), 32)
    assert table.tolist() == [[0, 1, 0, 26, 29], [0, 0, 2, 8, 4]]


@pytest.mark.parametrize("seed", [0, 1, 2**62])
@pytest.mark.parametrize(("flip", "shift", "cutout"), [(True, 4, 8), (True, 0, 0), (False, 2, 0), (False, 0, 12)])
def test_each_decision_is_the_draw_of_its_own_key(seed: int, flip: bool, shift: int, cutout: int) -> None:
    augmentation = Augmentation(seed, flip, shift, cutout)
    indices = np.array([0, 1, 77, 49_999])
    for epoch in (0, 3):
        wanted = [by_hand(augmentation, epoch, int(index), 32) for index in indices]
        assert decide(augmentation, epoch, indices, 32).tolist() == wanted


def test_a_decision_is_of_the_sample_not_of_its_place_and_differs_between_epochs() -> None:
    augmentation = Augmentation(0, True, 4, 8)
    indices = np.arange(500)
    table = decide(augmentation, 2, indices, 32)
    shuffled = np.random.default_rng(0).permutation(500)
    assert np.array_equal(decide(augmentation, 2, shuffled, 32), table[shuffled])
    assert np.array_equal(decide(augmentation, 2, indices[100:110], 32), table[100:110])
    assert (decide(augmentation, 3, indices, 32) != table).any(axis=1).mean() > 0.99


def test_decisions_cover_their_ranges_evenly() -> None:
    table = decide(Augmentation(0, True, 2, 30), 0, np.arange(30_000), 32)
    # flips 2 bins, shifts 5, the cutout's corner 3: chi-squared below the value that 999 of 1,000 stay under
    for column, low, bins, limit in (
        (0, 0, 2, 10.8),
        (1, -2, 5, 18.5),
        (2, -2, 5, 18.5),
        (3, 0, 3, 13.8),
        (4, 0, 3, 13.8),
    ):
        counts = np.bincount(table[:, column] - low, minlength=bins)
        assert len(counts) == bins
        wanted = 30_000 / bins
        assert ((counts - wanted) ** 2 / wanted).sum() < limit


def test_nothing_is_decided_where_nothing_is_asked() -> None:
    assert not decide(Augmentation(3, False, 0, 0), 1, np.arange(100), 32).any()


# -- pixels ----------------------------------------------------------------------------------------------------------


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
    table = decide(Augmentation(5, flip, shift, cutout), 1, np.arange(60), 8)
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
    table = decide(Augmentation(0, False, 0, 9), 0, np.arange(3), 8)
    assert not moved(images, table, 9, lut).any()


def test_gray_images_have_one_channel() -> None:
    images, lut = images_of(10, channels=1), lookup_table((0.5,), (0.25,), "float32")
    table = decide(Augmentation(0, True, 2, 3), 0, np.arange(10), 8)
    out = moved(images, table, 3, lut)
    for i in range(10):
        assert np.array_equal(out[i], reference(images[i], table[i].tolist(), 3, lut))


@pytest.mark.parametrize(("side", "shift"), [(9, 0), (13, 4), (13, 9)])
def test_a_crop_moves_inside_the_stored_image_and_a_shift_shows_black_only_outside_of_it(side: int, shift: int) -> None:
    images, lut = images_of(60, size=side), lookup_table(MEAN, STD, "float32")
    augmentation = Augmentation(3, True, shift, 2)
    table = decide(augmentation, 4, np.arange(60), 8, side)
    for i in range(60):
        at = [uniform(side - 8 + 1, 3, Stream.CROP, 4, i, axis) for axis in (0, 1)]
        row = by_hand(augmentation, 4, i, 8)
        assert table[i].tolist() == [row[0], row[1] + at[0], row[2] + at[1], *row[3:]]
    assert np.array_equal(decide(augmentation, 4, np.arange(60), 8, 8), decide(augmentation, 4, np.arange(60), 8))
    out = moved(images, table, 2, lut, size=8)
    for i in range(60):
        assert np.array_equal(out[i], reference(images[i], table[i].tolist(), 2, lut, size=8))


def test_crops_without_shift_reach_every_place_and_never_the_outside() -> None:
    corners = decide(Augmentation(0, False, 0, 0), 0, np.arange(3_000), 8, 10)[:, 1:3]
    assert {tuple(corner) for corner in corners.tolist()} == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize(("side", "corner"), [(8, 0), (9, 0), (10, 1), (13, 2)])
def test_an_evaluation_takes_the_middle(side: int, corner: int) -> None:
    images, lut = images_of(2, size=side), lookup_table(MEAN, STD, "float32")
    out = moved(images, centred(2, 8, side), 0, lut, size=8)
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
    images, table = images_of(40, size=11), decide(Augmentation(5, True, 4, 3), 1, np.arange(40), 8, 11)
    lut = lookup_table((0.5,), (0.25,), "float32")
    weighed = images.astype(np.int64) @ np.array([19595, 38470, 7471])
    gray = ((weighed + 32768) // 65536).astype(np.uint8)[..., None]
    assert np.array_equal(moved(images, table, 3, lut, size=8), moved(gray, table, 3, lut, size=8))


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
