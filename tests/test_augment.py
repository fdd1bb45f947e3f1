"""Claims about what is decided for a training image: by keys alone, evenly, and in integers."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dtrain.data import pixels
from dtrain.data.augment import (
    ONE,
    QUANTILES,
    RECORDS,
    Draws,
    Place,
    Record,
    beta_quantiles,
    decide,
    mixed_labels,
    undecided,
)
from dtrain.keyed import Stream, key
from dtrain.settings.augmentation import Augmentation
from dtrain.settings.config import TrainConfig

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


def moves(*asked: Any) -> npt.NDArray[np.int32]:
    return decide(*asked).moves


def uniform(n: int, *words: int) -> int:
    """The draw in [0, n) of one key: its high 32 bits times n, over 2^32; in Python's own integers."""
    return (int(key(*words)) >> 32) * n >> 32  # type: ignore[arg-type]


def by_hand(augmentation: Augmentation, seed: int, epoch: int, sample: int, size: int) -> list[int]:
    """The decisions for one sample, from the hash alone."""
    shift, cutout = augmentation.shift, augmentation.cutout
    row = [uniform(2, seed, Stream.FLIP, epoch, sample, 0) if augmentation.flip else 0]
    for axis in (0, 1):
        row.append(uniform(2 * shift + 1, seed, Stream.SHIFT, epoch, sample, axis) - shift if shift else 0)
    for axis in (0, 1):
        row.append(uniform(size - cutout + 1, seed, Stream.CUTOUT, epoch, sample, axis) if cutout else 0)
    return row


# -- decisions -------------------------------------------------------------------------------------------------------


def test_golden_decisions_never_change() -> None:
    # worked out with Python's own integers, from splitmix64 as published
    table = moves(Augmentation(flip=True, shift=4, cutout=8), 0, 0, np.arange(4), 32)
    assert table.dtype == np.int32
    assert table.tolist() == [[0, -4, -2, 20, 23], [0, 3, -4, 12, 12], [0, -3, -1, 18, 14], [1, -3, 1, 23, 20]]
    table = moves(Augmentation(flip=True, shift=2, cutout=3), 17, 5, np.array([49_999, 0]), 32)
    assert table.tolist() == [[0, 1, 0, 26, 29], [0, 0, 2, 8, 4]]


@pytest.mark.parametrize("seed", [0, 1, 2**62])
@pytest.mark.parametrize(("flip", "shift", "cutout"), [(True, 4, 8), (True, 0, 0), (False, 2, 0), (False, 0, 12)])
def test_each_decision_is_the_draw_of_its_own_key(seed: int, flip: bool, shift: int, cutout: int) -> None:
    augmentation = Augmentation(flip=flip, shift=shift, cutout=cutout)
    indices = np.array([0, 1, 77, 49_999])
    for epoch in (0, 3):
        wanted = [by_hand(augmentation, seed, epoch, int(index), 32) for index in indices]
        assert moves(augmentation, seed, epoch, indices, 32).tolist() == wanted


def test_a_decision_is_of_the_sample_not_of_its_place_and_differs_between_epochs() -> None:
    augmentation = Augmentation(flip=True, shift=4, cutout=8)
    indices = np.arange(500)
    table = moves(augmentation, 0, 2, indices, 32)
    shuffled = np.random.default_rng(0).permutation(500)
    assert np.array_equal(moves(augmentation, 0, 2, shuffled, 32), table[shuffled])
    assert np.array_equal(moves(augmentation, 0, 2, indices[100:110], 32), table[100:110])
    assert (moves(augmentation, 0, 3, indices, 32) != table).any(axis=1).mean() > 0.99


def test_decisions_cover_their_ranges_evenly() -> None:
    table = moves(Augmentation(flip=True, shift=2, cutout=30), 0, 0, np.arange(30_000), 32)
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
    decisions = decide(Augmentation(), 3, 1, np.arange(100), 32)
    assert len(list(decisions.columns())) == 5
    assert not any(column.any() for column in decisions.columns())
    assert decisions.cutout == 0


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_crop_is_drawn_where_more_is_stored_and_adds_to_the_shift(room: int) -> None:
    augmentation = Augmentation(flip=True, shift=2, cutout=3)
    table = moves(augmentation, 3, 4, np.arange(60), 8, 8 + room)
    for i in range(60):
        row = by_hand(augmentation, 3, 4, i, 8)
        crop = [uniform(room + 1, 3, Stream.CROP, 4, i, axis) for axis in (0, 1)] if room else [0, 0]
        assert table[i].tolist() == [row[0], row[1] + crop[0], row[2] + crop[1], *row[3:]]


def test_crops_reach_every_place_and_never_the_outside() -> None:
    corners = moves(Augmentation(), 0, 0, np.arange(3_000), 8, 10)[:, 1:3]
    assert {tuple(corner) for corner in corners.tolist()} == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize(("stored", "corner"), [(8, 0), (9, 0), (10, 1), (13, 2)])
def test_an_evaluation_takes_the_middle(stored: int, corner: int) -> None:
    assert undecided(2, 8, stored).moves.tolist() == [[0, corner, corner, 0, 0]] * 2


def test_settings_given_short_are_filled_up() -> None:
    def of(**settings: Any) -> Augmentation:
        return TrainConfig.of(recipe="none", arch="x", **settings).augmentation

    assert of() == Augmentation()
    assert of(flip=True, shift=2, cutout=8) == Augmentation(flip=True, shift=2, cutout=8)
    assert of(scale="0.35").scale == of(scale="0.35,1").scale == (0.35, 1.0)
    assert of(affine=15).affine == (15.0, 0.0, 0.0, 0.0)
    assert of(affine="15,0.1,0.2").affine == (15.0, 0.1, 0.2, 0.0)
    assert of(jitter=0.4).jitter == (0.4, 0.4, 0.4)
    assert of(jitter="0.4,0,0.1").jitter == (0.4, 0.0, 0.1)
    assert [of(mixup=0.2).mixes, of(cutmix=1).mixes, of(erase=1).mixes] == [True, True, False]


# -- what is shown, and how it lies ------------------------------------------------------------------------------------


def real(*words: int) -> float:
    """The draw in [0, 1) of one key: its high 53 bits over 2^53."""
    return (int(key(*words)) >> 11) / 2**53  # type: ignore[arg-type]


def rectangle(seed: int, stream: Stream, epoch: int, sample: int, side: int, areas: Any, shapes: Any) -> list[int]:
    """Area uniform, width over height uniform in its logarithm among those that fit, any place alike; whole pixels."""
    area = areas[0] + (areas[1] - areas[0]) * real(seed, stream, epoch, sample, 0)
    narrow, wide = max(shapes[0], area), min(shapes[1], 1 / area)
    shape = narrow * (wide / narrow) ** real(seed, stream, epoch, sample, 1)
    height = min(max(round(side * math.sqrt(area / shape)), 1), side)
    width = min(max(round(side * math.sqrt(area * shape)), 1), side)
    top = math.floor(real(seed, stream, epoch, sample, 2) * (side - height + 1))
    return [top, math.floor(real(seed, stream, epoch, sample, 3) * (side - width + 1)), height, width]


def placed(row: list[int], x: float, y: float) -> tuple[float, float]:
    """Where pixel (x, y) comes from."""
    xx, xy, x0, yx, yy, y0 = (number / ONE for number in row)
    return xx * x + xy * y + x0, yx * x + yy * y + y0


@pytest.mark.parametrize(("size", "stored"), [(32, 32), (24, 40)])
def test_a_part_is_stretched_from_corner_to_corner_then_shifted_then_flipped(size: int, stored: int) -> None:
    maps = decide(Augmentation(flip=True, shift=2, scale=(0.2, 1.0)), 5, 1, np.arange(200), size, stored).maps
    assert maps is not None
    assert (maps.dtype, maps.shape) == (np.int64, (200, 6))
    for i in range(200):
        top, left, height, width = rectangle(5, Stream.SCALE, 1, i, stored, (0.2, 1.0), (3 / 4, 4 / 3))
        assert 0 <= top <= top + height <= stored
        assert 0 <= left <= left + width <= stored
        flip = uniform(2, 5, Stream.FLIP, 1, i, 0)
        dy, dx = (uniform(5, 5, Stream.SHIFT, 1, i, axis) - 2 for axis in (0, 1))
        for x, y in ((-0.5, -0.5), (size - 0.5, -0.5), (-0.5, size - 0.5), (size - 0.5, size - 0.5)):
            shown_x = (size - 1 - x if flip else x) + dx
            # corners of the pixels: -1/2 is the outer edge of the first, size - 1/2 that of the last
            wanted = (left - 0.5 + (shown_x + 0.5) / size * width, top - 0.5 + (y + dy + 0.5) / size * height)
            assert placed(maps[i].tolist(), x, y) == pytest.approx(wanted, abs=2 * size / ONE)


def test_parts_have_the_areas_and_shapes_that_were_asked_for() -> None:
    maps = decide(Augmentation(scale=(0.35, 1.0)), 0, 0, np.arange(20_000), 200).maps
    assert maps is not None
    width, height = maps[:, 0] / ONE, maps[:, 4] / ONE
    area, shape = width * height, width / height
    assert 0.345 < area.min() < 0.36
    assert 0.99 < area.max() <= 1.0
    bins = np.histogram(area, 13, (0.35, 1.0))[0] / 20_000 * 13
    assert bins == pytest.approx(np.ones(13), abs=0.12)  # uniform: 1,540 each, give or take three deviations of 38
    assert 0.74 < shape.min() < 0.77
    assert 1.30 < shape.max() < 1.35
    assert np.log(shape).mean() == pytest.approx(0, abs=0.01)
    assert not maps[:, [1, 3]].any()


def test_an_affine_map_shears_zooms_turns_and_moves_about_the_middle() -> None:
    most = (30.0, 0.1, 0.2, 10.0)
    maps = decide(Augmentation(shift=1, affine=most), 5, 2, np.arange(100), 17, 20).maps
    assert maps is not None
    for i in range(100):
        degrees, x, y, zoom, shear = (2 * real(5, Stream.AFFINE, 2, i, n) - 1 for n in range(5))
        turn, lean, zoom = math.radians(30 * degrees), math.tan(math.radians(10 * shear)), 1 + 0.2 * zoom
        dy, dx = (uniform(3, 5, Stream.SHIFT, 2, i, axis) - 1 for axis in (0, 1))
        top, left = (uniform(4, 5, Stream.CROP, 2, i, axis) for axis in (0, 1))
        for u, v in ((0.0, 0.0), (8.0, 0.0), (0.0, -8.0), (3.0, 5.0)):  # a point of the crop, from its middle at 8
            a, b = zoom * (u + lean * v), zoom * v
            a, b = math.cos(turn) * a - math.sin(turn) * b, math.sin(turn) * a + math.cos(turn) * b
            a, b = a + 0.1 * 17 * x - dx, b + 0.1 * 17 * y - dy  # is seen here, from the middle at 8
            assert placed(maps[i].tolist(), a + 8, b + 8) == pytest.approx((u + 8 + left, v + 8 + top), abs=20 / ONE)


def test_a_quarter_of_a_turn_is_exact() -> None:
    maps = decide(Augmentation(affine=(180.0, 0.0, 0.0, 0.0)), 0, 0, np.arange(4_000), 32).maps
    assert maps is not None
    # the nearest of 4,000 angles to 90 degrees is within a tenth of a degree: sine 1, cosine below 0.002
    nearest = maps[np.abs(maps[:, 0]).argmin()]
    assert abs(nearest[0]) < 0.002 * ONE
    assert abs(abs(nearest[1]) - ONE) < 2
    flat = decide(Augmentation(affine=(0.0, 0.0, 0.0, 0.0)), 0, 0, np.arange(4), 32).maps
    assert flat is not None
    assert flat.tolist() == [[ONE, 0, 0, 0, ONE, 0]] * 4


# -- jitter and erasing ------------------------------------------------------------------------------------------------


def test_factors_lie_about_1_as_wide_as_asked() -> None:
    factors = decide(Augmentation(jitter=(0.4, 0.0, 1.0)), 2, 3, np.arange(500), 8).tables["jitter"]
    assert (factors.dtype, factors.shape) == (np.int32, (500, 3))
    for i in range(500):
        draws = [2 * real(2, Stream.JITTER, 3, i, n) - 1 for n in range(3)]
        assert factors[i].tolist() == [round(ONE * (1 + most * d)) for most, d in zip((0.4, 0, 1), draws, strict=True)]


def test_as_many_images_are_erased_as_asked_each_in_a_rectangle_of_its_own() -> None:
    erasures = decide(Augmentation(erase=0.25), 2, 3, np.arange(4_000), 64).tables["erase"]
    erased = 0
    for i in range(4_000):
        asked = real(2, Stream.ERASE, 3, i, 0) < 0.25
        erased += asked
        wanted = rectangle(2, Stream.ERASED, 3, i, 64, (0.02, 1 / 3), (0.3, 10 / 3)) if asked else [0, 0, 0, 0]
        assert erasures[i].tolist() == wanted
    assert 900 < erased < 1_100


# -- mixing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "probability_at"),
    [
        (1.0, lambda x: x),
        (0.5, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5),
    ],
)
def test_quantiles_of_beta_are_those_of_its_closed_forms(alpha: float, probability_at: Any) -> None:
    quantiles = beta_quantiles(alpha).tolist()
    assert len(quantiles) == QUANTILES
    for i, quantile in enumerate(quantiles):
        # rounded to units of 1 / ONE, so the true one is within half of one
        below, above = max(quantile - 0.51, 0), min(quantile + 0.51, ONE)
        assert probability_at(below / ONE) <= (i + 0.5) / QUANTILES <= probability_at(above / ONE)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.2, 0.7, 1.5, 8.0, 100.0])
def test_quantiles_of_beta_are_symmetric_ascending_and_spread_as_they_should(alpha: float) -> None:
    x = beta_quantiles(alpha) / ONE
    assert (np.diff(x) >= 0).all()
    assert (x + x[::-1] == 1).all()
    assert x.min() >= 0
    # the variance of Beta(a, a); 4,096 values stand for all, so the ends are a little short
    assert x.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.005)


def mixtures_of(augmentation: Augmentation, seed: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    mixtures = decide(augmentation, seed, 1, indices, 32).tables["mix"]
    assert (mixtures.dtype, mixtures.shape) == (np.int64, (len(indices), 6))
    return mixtures


def test_partners_are_neighbours_with_one_share_drawn_by_the_first() -> None:
    mixtures = mixtures_of(Augmentation(mixup=0.4), 3, np.array([7, 9, 4, 2]))
    own = [int(beta_quantiles(0.4)[uniform(QUANTILES, 3, Stream.MIX, 1, first, 1)]) for first in (7, 4)]
    assert mixtures[:, 0].tolist() == [9, 7, 2, 4]
    assert mixtures[:, 1].tolist() == [own[0], own[0], own[1], own[1]]
    assert not mixtures[:, 4].any()  # nothing is cut
    assert mixtures_of(Augmentation(mixup=0.4), 3, np.array([4, 2]))[:, 1:].tolist() == mixtures[2:, 1:].tolist()


def test_a_rectangle_has_the_area_that_was_drawn_about_any_pixel_and_what_is_inside_counts() -> None:
    indices = np.arange(2_000)
    mixtures = mixtures_of(Augmentation(cutmix=1.0), 3, indices)
    clipped = 0
    for first in range(0, 2_000, 2):
        drawn = int(beta_quantiles(1.0)[uniform(QUANTILES, 3, Stream.MIX, 1, first, 1)]) / ONE
        side = round(32 * math.sqrt(1 - drawn))
        top, left = (uniform(32, 3, Stream.MIX, 1, first, n) - side // 2 for n in (2, 3))
        rows, columns = (range(max(at, 0), min(at + side, 32)) for at in (top, left))
        clipped += len(rows) * len(columns) < side**2
        own = ONE - round(ONE * len(rows) * len(columns) / 1024)
        wanted = [own, max(top, 0), max(left, 0), len(rows), len(columns)]
        assert mixtures[first, 1:].tolist() == mixtures[first + 1, 1:].tolist() == wanted
    assert 0 < clipped < 1_000


def test_both_kinds_share_the_pairs_half_and_half() -> None:
    both = mixtures_of(Augmentation(mixup=0.4, cutmix=1.0), 3, np.arange(4_000))
    blend, cut = (mixtures_of(Augmentation(**kind), 3, np.arange(4_000)) for kind in ({"mixup": 0.4}, {"cutmix": 1.0}))
    chosen = [uniform(2, 3, Stream.MIX, 1, first, 0) for first in range(0, 4_000, 2) for _ in (0, 1)]
    assert 1_850 < sum(chosen) < 2_150
    for i in range(4_000):
        assert (both[i, 1], both[i, 4], both[i, 5]) == tuple((cut if chosen[i] else blend)[i, [1, 4, 5]])


def test_labels_are_shares_that_add_up_to_1() -> None:
    mixtures = np.array(
        [[0, ONE // 4, 0, 0, 0, 0]] * 2 + [[0, ONE - 1, 0, 0, 1, 1]] * 2 + [[0, ONE // 3, 0, 0, 0, 0]] * 2
    )
    labels = mixed_labels(np.array([0, 2, 1, 3, 2, 2]), mixtures, 4)
    assert labels.dtype == np.float32
    assert labels[:2].tolist() == [[0.25, 0, 0.75, 0], [0.75, 0, 0.25, 0]]
    assert labels[2].tolist() == [0, 1 - 2**-16, 0, 2**-16]
    assert labels[4].tolist() == labels[5].tolist() == [0, 0, 1, 0]  # partners of one class
    assert (labels.sum(1) == 1).all()


# -- one record each ---------------------------------------------------------------------------------------------------


def test_no_stream_is_drawn_from_by_two_augmentations_and_every_setting_belongs_to_one() -> None:
    streams = [stream for record in RECORDS for stream in record.streams]
    assert len(streams) == len(set(streams))
    settings = [name for record in RECORDS for name in record.settings]
    assert sorted(settings) == sorted(vars(Augmentation()))
    assert len({record.name for record in RECORDS}) == len(RECORDS)


def test_what_is_decided_imports_no_compiler() -> None:
    code = "import sys, dtrain.data.augment; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def mirrored(augmentation: Augmentation, draws: Draws) -> tuple[Any, Any]:
    """Half of the pictures upside down: the map of Place.AFFINE that leaves x and turns y over."""
    turned = np.eye(2)[..., None].repeat(len(draws.samples), 2)
    turned[1, 1] -= 2 * draws.integers(0, 2)
    return turned, np.zeros((2, len(draws.samples)))


def test_an_augmentation_is_added_by_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    upside_down = Record("upside down", ("flip",), (Stream.REHEARSAL,), Place.AFFINE, mirrored)
    negative = Record("negative", ("flip",), (Stream.SYNTHETIC,), Place.BYTES, lambda a, d: d.integers(0, 2), "negate")
    decisions = decide(Augmentation(flip=True), 3, 1, np.arange(40), 8)
    assert (decisions.maps, decisions.tables) == (None, {})
    for module in ("dtrain.data.augment", "dtrain.data.pixels"):
        monkeypatch.setattr(f"{module}.RECORDS", (*RECORDS, upside_down, negative))
    monkeypatch.setattr(
        pixels, "negate", lambda table, images: images.__setitem__(table == 1, 255 - images[table == 1]), False
    )
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    decisions, out = decide(Augmentation(flip=True), 3, 1, np.arange(40), 8), np.empty_like(images)
    offsets, lut = np.arange(40, dtype=np.uint64) * np.uint64(192), np.arange(256, dtype=np.uint8)[None].repeat(3, 0)
    pixels.write_images(images.reshape(-1), offsets, 8, 3, decisions, lut, out)
    for i in range(40):
        flip, turn, negate = (uniform(2, 3, s, 1, i, 0) for s in (Stream.FLIP, Stream.REHEARSAL, Stream.SYNTHETIC))
        wanted = images[i][:: -1 if turn else 1, :: -1 if flip else 1]
        assert np.array_equal(out[i], 255 - wanted if negate else wanted)


def test_two_affine_maps_are_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_first(augmentation: Augmentation, draws: Draws) -> tuple[Any, Any]:
        return np.array([[0.0, 2.0], [-1.0, 0.5]])[..., None], np.array([[3.0], [1.0]])

    def by_second(augmentation: Augmentation, draws: Draws) -> tuple[Any, Any]:
        return np.array([[1.0, 0.25], [0.0, -1.0]])[..., None], np.array([[-2.0], [4.0]])

    both = [Record(d.__name__, ("flip",), (Stream.REHEARSAL,), Place.AFFINE, d) for d in (by_first, by_second)]
    monkeypatch.setattr("dtrain.data.augment.RECORDS", (RECORDS[0], *both))
    maps = decide(Augmentation(flip=True), 0, 0, np.array([7]), 9).maps
    assert maps is not None
    for x, y in ((0, 0), (8, 0), (3, 5)):
        u, v = x - 4 + 2, y - 4 - 4  # from the middle, less the second one's translation
        u, v = u + 0.25 * v - 3, -v - 1  # in the picture that the first one gives, less its translation
        assert placed(maps[0].tolist(), x, y) == pytest.approx((2 * v + 4, -u + 0.5 * v + 4), abs=1e-3)


# -- all together ------------------------------------------------------------------------------------------------------


def test_every_decision_is_of_the_sample_or_its_pair_and_differs_between_epochs_and_seeds() -> None:
    indices = np.arange(400)
    whole = list(decide(EVERYTHING, 9, 2, indices, 24, 32).columns())
    assert len(whole) == 5 + 6 + 3 + 6 + 4
    pairs = np.random.default_rng(0).permutation(200)
    shuffled = (2 * pairs[:, None] + [0, 1]).ravel()
    for one, other in zip(whole, decide(EVERYTHING, 9, 2, indices[shuffled], 24, 32).columns(), strict=True):
        assert np.array_equal(other, one[shuffled])
    part = decide(EVERYTHING, 9, 2, indices, 24, 32).of(slice(100, 150))
    alone = decide(EVERYTHING, 9, 2, indices[100:150], 24, 32)
    for one, cut, other in zip(whole, part.columns(), alone.columns(), strict=True):
        assert one[100:150].tolist() == cut.tolist() == other.tolist()
    for others in (decide(EVERYTHING, 9, 3, indices, 24, 32), decide(EVERYTHING, 10, 2, indices, 24, 32)):
        differ = [(one != other).mean() for one, other in zip(whole, others.columns(), strict=True)]
        assert min(differ[:1] + differ[5:14]) > 0.4


def test_golden_tables_never_change() -> None:
    # every number of them is worked out by hand in the tests above
    decisions = decide(EVERYTHING, 9, 1, np.array([3, 1]), 16, 20)
    tables = (decisions.moves, decisions.tables["jitter"], decisions.tables["erase"])
    assert [table.tolist() for table in tables] == [
        [[0, -1, 1, 6, 0], [1, 1, 1, 5, 0]],
        [[87165, 93418, 40704], [56169, 80108, 52195]],
        [[6, 0, 6, 9], [0, 0, 0, 0]],
    ]
    assert decisions.maps is not None
    assert decisions.maps.tolist() == [
        [40865, -14090, 606238, 8421, 45536, -26466],
        [-54690, -5864, 1018011, -12673, 44709, 593510],
    ]
    assert decisions.tables["mix"].tolist() == [[1, 61440, 2, 8, 4, 4], [3, 61440, 2, 8, 4, 4]]
