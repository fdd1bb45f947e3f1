"""The augmentation of training images: it is decided here, as small tables of integers, and carried out by `pixels.py`.

Every random number is a hash of seed, epoch and sample (dtrain.keyed), so no generator has a state. Each augmentation
is one record in RECORDS, at the end of this file. The order of operations is fixed:

1. The crop out of the stored picture: with --scale a box of random area and shape, else a square of the image size.
2. An affine map about the middle of the crop: rotation, translation, scale and shear.
3. A shift.
4. A flip, left to right.
5. Conversion to gray, where the network is given one channel.
6. Changes of the bytes: jitter (brightness, then contrast, then saturation), then mixing with the partner. Positions
   2i and 2i + 1 of the global batch are partners.
7. Shrinking of the whole picture, where a stage of the run trains on smaller images.
8. Normalisation.
9. Rectangles that are set to the mean: the cutout, then the erased ones.

Steps 1 to 4 are carried out as one map from the pixels of the output to places in the stored picture; between stored
pixels, values are interpolated bilinearly. Where a shift or a rotation reaches beyond the crop, the stored pixels there
are used, and black outside of the stored picture. Up to step 7 all arithmetic is done on integers, so every
implementation gives the same bits; what has to be computed in floating point (roots, cosines, quantiles) is rounded to
integers here. Decisions are drawn at the full image size, so they do not depend on the stage of the run.

Legend: n images; S the side of an output image before it is shrunk; ONE = 2^16 stands for 1 in fixed-point numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.keyed import Stream, integers, key, uniforms
from dtrain.settings.augmentation import Augmentation

Table = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

ONE = 1 << 16  # the number 1 in the fixed-point numbers of maps, factors and weights
SHAPES = (3 / 4, 4 / 3)  # width over height of a random resized crop, as in Szegedy et al. 2015
ERASED_AREAS, ERASED_SHAPES = (0.02, 1 / 3), (0.3, 10 / 3)  # Zhong et al. 2017, "Random Erasing", as in torchvision
QUANTILES = 4096  # number of different values that the blending weight of mixup and cutmix may take


@dataclass(frozen=True, eq=False)
class Decisions:
    """All augmentation decisions for n images.

    moves: int32 [n, 5] of flip (0 or 1), dy, dx and the cutout's top and left edge; dy and dx are the row and the
    column of the stored picture that the output begins with. cutout: side of the square in pixels, 0 for none.
    maps: int64 [n, 6] of xx, xy, x0, yx, yy, y0 in units of 1 / ONE, which replace flip, dy and dx: pixel (x, y) shows
    what is stored at (xx x + xy y + x0, yx x + yy y + y0). None where moves by whole pixels are enough.
    tables: the decisions of all other augmentations in use, [n, ...] each, by the name of the record.
    """

    moves: npt.NDArray[np.int32]
    cutout: int = 0
    maps: Indices | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)

    def columns(self) -> Iterator[Table]:
        """Every column of every table, in a fixed order: what the checksum of a batch covers."""
        yield from self.moves.T
        if self.maps is not None:
            yield from self.maps.T
        for table in self.tables.values():
            yield from table.T

    def of(self, part: slice) -> Decisions:
        """The decisions for some of the images; the slice must not separate partners."""
        maps = None if self.maps is None else self.maps[part]
        return Decisions(self.moves[part], self.cutout, maps, {n: table[part] for n, table in self.tables.items()})


@dataclass(frozen=True)
class Draws:
    """The random numbers of one stream for some samples in one epoch, and the sizes that they are scaled to.

    Every number is a function of (seed, stream, epoch, sample, n) alone: of the sample and not of its place in a batch.
    samples: int64 [n]. size: S. stored: side of the stored pictures, which may be larger.
    """

    seed: int
    stream: Stream
    epoch: int
    samples: Indices
    size: int
    stored: int

    def integers(self, n: int, below: int) -> Indices:
        """The n-th number of each sample, int64 in [0, below)."""
        return integers(key(self.seed, self.stream, self.epoch, self.samples, n), below)

    def uniforms(self, count: int) -> Reals:
        """The first `count` numbers of each sample, float64 in [0, 1), [count, n]."""
        return uniforms(key(self.seed, self.stream, self.epoch, self.samples, np.arange(count)[:, None]))

    def of_pairs(self) -> Draws:
        """The draws for pairs of partners: both take the random numbers of the first one."""
        return replace(self, samples=self.samples[::2])


class Place(Enum):
    """At which point of the order above an augmentation acts; this determines what its decision function returns."""

    MOVE = "one of the moves that `decide` and the fast kernel know; a new geometric augmentation is an affine map"
    AFFINE = "an affine map about the middle: inverse matrices [2, 2, n] and translations [2, n], as x, y"
    BYTES = "a table [n, ...] for its kernel, which changes bytes in place: kernel(table, images uint8 [n, S, S, C])"
    BLANK = "rectangles to set to the mean, int32 [n, 4] of top, left, height, width; height 0 for none"


@dataclass(frozen=True)
class Record:
    """All facts about one augmentation.

    name: key of its table in `Decisions.tables`. settings: the attributes of `Augmentation` that switch it on; if there
    are none, it is always on. streams: the random streams that this augmentation alone draws from.
    decide(augmentation, *draws): computes its decision, from one `Draws` for each stream. place: see Place; records of
    one place are carried out in the order of RECORDS. kernel: for Place.BYTES, the name of its function in `pixels.py`;
    it is only named here, so that this file need not import numba.
    """

    name: str
    settings: tuple[str, ...]
    streams: tuple[Stream, ...]
    place: Place
    decide: Callable[..., Any]
    kernel: str = ""

    def is_asked(self, augmentation: Augmentation) -> bool:
        """Whether these settings switch the augmentation on."""
        return not self.settings or any(getattr(augmentation, name) for name in self.settings)


def decide(
    augmentation: Augmentation, seed: int, epoch: int, indices: Indices, size: int, stored: int | None = None
) -> Decisions:
    """The decisions for the samples `indices`, int64 [n], in `epoch`; n must be even where images are mixed.

    size: S. stored: side of the stored pictures, in which a crop moves if it is larger than S; S if left out.
    Pure; some 300 us for 512 images.
    """

    def decided(record: Record) -> Any:
        draws = (Draws(seed, stream, epoch, indices, size, stored or size) for stream in record.streams)
        return record.decide(augmentation, *draws)

    made = {record.name: decided(record) for record in RECORDS if record.is_asked(augmentation)}
    shift = made.get("shift", np.zeros((len(indices), 2), dtype=np.int64))
    moves = np.zeros((len(indices), 5), dtype=np.int32)
    moves[:, 0] = made.get("flip", 0)
    moves[:, 1:3] = made["crop"] + shift
    moves[:, 3:5] = made.get("cutout", 0)
    affine = [made[record.name] for record in RECORDS if record.place is Place.AFFINE and record.name in made]
    maps, box = None, made.get("scale")
    if affine or box is not None:
        if box is None:
            box = np.concatenate((made["crop"], np.full_like(made["crop"], size)), axis=1)
        maps = _maps(box, affine, shift, moves[:, 0], size)
    tables = {r.name: made[r.name] for r in RECORDS if r.place in (Place.BYTES, Place.BLANK) and r.name in made}
    return Decisions(moves, augmentation.cutout, maps, tables)


def undecided(count: int, size: int, stored: int) -> Decisions:
    """The decisions for `count` images of an evaluation: a crop in the middle of the stored picture, and no more."""
    moves = np.zeros((count, 5), dtype=np.int32)
    moves[:, 1:3] = (stored - size) // 2
    return Decisions(moves)


def mixed_labels(labels: Indices, mixtures: Indices, classes: int) -> npt.NDArray[np.float32]:
    """Labels of mixed images, float32 [n, K]: the weights of the image's own class and of its partner's class.

    Each row adds up to exactly 1.

    labels: int64 [n]. mixtures: the table of the record "mix".
    """
    rows, own = np.arange(len(labels)), (mixtures[:, 1] / ONE).astype(np.float32)
    shares = np.zeros((len(labels), classes), dtype=np.float32)
    shares[rows, labels] = own
    shares[rows, labels[rows ^ 1]] += 1 - own
    return shares


# -- geometry ----------------------------------------------------------------------------------------------------------


def _crop(augmentation: Augmentation, draws: Draws) -> Indices:
    """Top and left edge of a crop in a larger stored picture, int64 [n, 2]; 0 where --scale draws the crop."""
    room = 0 if augmentation.scale else draws.stored - draws.size
    if not room:
        return np.zeros((len(draws.samples), 2), dtype=np.int64)
    return np.stack([draws.integers(axis, room + 1) for axis in (0, 1)], axis=1)


def _part(augmentation: Augmentation, draws: Draws) -> Indices:
    return _rectangles(draws, draws.stored, augmentation.scale, SHAPES)


def _shift(augmentation: Augmentation, draws: Draws) -> Indices:
    """Rows and columns by which the picture is moved, int64 [n, 2]."""
    most = augmentation.shift
    return np.stack([draws.integers(axis, 2 * most + 1) - most for axis in (0, 1)], axis=1)


def _flip(augmentation: Augmentation, draws: Draws) -> Indices:
    return draws.integers(0, 2)


def _affine(augmentation: Augmentation, draws: Draws) -> tuple[Reals, Reals]:
    """Affine maps about the middle, as inverse matrices and translations: see Place.AFFINE.

    The picture is sheared along its rows, scaled by a factor about 1, rotated (clockwise if positive) and moved.
    """
    most = augmentation.affine or (0.0, 0.0, 0.0, 0.0)
    degrees, x, y, scale, shear = 2 * draws.uniforms(5) - 1
    turn, lean = np.radians(most[0] * degrees), np.tan(np.radians(most[3] * shear))
    zoom, cos, sin = 1 + most[2] * scale, np.cos(turn), np.sin(turn)
    inverse = np.array([[cos + lean * sin, sin - lean * cos], [-sin, cos]]) / zoom
    return inverse, most[1] * draws.size * np.array([x, y])


def _maps(boxes: Indices, affine: list[tuple[Reals, Reals]], shift: Indices, flip: Table, size: int) -> Indices:
    """Flip, shift, affine maps and crop as one map from output pixels to places in the stored picture; see Decisions.

    The map is computed about the middle of the output and the middle of the crop: both are multiples of 1/2, which
    floating point holds exactly.
    """
    top, left, height, width = boxes.T
    dy, dx = shift.T
    mirror, middle = 1.0 - 2.0 * flip, (size - 1) / 2
    matrix, (moved_x, moved_y) = np.broadcast_to(np.eye(2)[..., None], (2, 2, len(flip))), (0.0, 0.0)
    if affine:
        matrix, (moved_x, moved_y) = functools.reduce(_after, affine)
    rows: list[Any] = []
    for (along_x, along_y), begin, length in ((matrix[0], left, width), (matrix[1], top, height)):
        of_x, of_y = along_x * (length / size), along_y * (length / size)
        at_middle = begin + (length - 1) / 2 + of_x * (dx - moved_x) + of_y * (dy - moved_y)
        rows += [of_x * mirror, of_y, at_middle - (of_x * mirror + of_y) * middle]
    maps: Indices = np.rint(np.stack(rows, axis=1) * ONE).astype(np.int64)
    return maps


def _after(first: tuple[Reals, Reals], second: tuple[Reals, Reals]) -> tuple[Reals, Reals]:
    """Two affine maps as one: the second is applied to the result of the first."""
    (inverse, moved), (next_inverse, next_moved) = first, second
    # a point p comes from inverse (next_inverse (p - next_moved) - moved)
    back = np.linalg.inv(next_inverse.transpose(2, 0, 1)).transpose(1, 2, 0)
    return np.einsum("ijn,jkn->ikn", inverse, next_inverse), next_moved + np.einsum("ijn,jn->in", back, moved)


def _rectangles(draws: Draws, side: int, areas: Any, shapes: tuple[float, float]) -> Indices:
    """Rectangles in a square of `side` pixels: int64 [n, 4] of top, left, height, width.

    areas: smallest and largest area as fractions of the square; drawn uniformly. shapes: smallest and largest width
    over height; drawn uniformly in the logarithm, among those that fit into the square at that area, so no draw is ever
    rejected and the distribution of areas is exact. Every position is equally likely.
    """
    u_area, u_shape, u_top, u_left = draws.uniforms(4)
    area = areas[0] + (areas[1] - areas[0]) * u_area
    low, high = np.log(np.maximum(shapes[0], area)), np.log(np.minimum(shapes[1], 1 / area))
    shape = np.exp(low + (high - low) * u_shape)
    height = np.clip(np.rint(side * np.sqrt(area / shape)), 1, side)
    width = np.clip(np.rint(side * np.sqrt(area * shape)), 1, side)
    top, left = np.floor(u_top * (side - height + 1)), np.floor(u_left * (side - width + 1))
    return np.stack((top, left, height, width), axis=1).astype(np.int64)


# -- bytes -------------------------------------------------------------------------------------------------------------


def _jitter(augmentation: Augmentation, draws: Draws) -> Table:
    """Factors of brightness, contrast and saturation, int32 [n, 3] in units of 1 / ONE."""
    spread = 2 * draws.uniforms(3).T - 1
    return np.rint((1 + np.array(augmentation.jitter) * spread) * ONE).astype(np.int32)


def _mix(augmentation: Augmentation, draws: Draws) -> Indices:
    """What mixup and cutmix do to each image, int64 [n, 6].

    The columns: the partner's sample number; the weight of the image's own label in units of 1 / ONE; top, left, height
    and width of the rectangle that is taken from the partner (cutmix), or height 0 (mixup, which blends the two).
    Both images of a pair have the same weight and rectangle. mixup (Zhang et al. 2018) draws the weight; cutmix (Yun et
    al. 2019) draws the area of a square about a random pixel, and the part outside of the image is cut off. With both
    switched on, each pair gets one of the two with equal probability.
    """
    pairs, size, samples = draws.of_pairs(), draws.size, draws.samples
    cut = np.full(len(pairs.samples), augmentation.cutmix > 0)
    if augmentation.mixup and augmentation.cutmix:
        cut = pairs.integers(0, 2) == 1
    probability = pairs.integers(1, QUANTILES)
    own = np.zeros(len(pairs.samples), dtype=np.int64)
    for alpha, its in ((augmentation.mixup, ~cut), (augmentation.cutmix, cut)):
        if alpha:
            own[its] = beta_quantiles(alpha)[probability[its]]
    side = np.where(cut, np.rint(size * np.sqrt(1 - own / ONE)), 0).astype(np.int64)
    edges = []
    for axis in (0, 1):
        begin = pairs.integers(2 + axis, size) - side // 2
        edges.append(np.clip((begin, begin + side), 0, size))
    (top, bottom), (left, right) = edges
    height, width = bottom - top, right - left
    own = np.where(cut, ONE - (ONE * height * width + size**2 // 2) // size**2, own)
    both = np.stack((own, top, left, height, width), axis=1).repeat(2, axis=0)
    return np.concatenate((samples[np.arange(len(samples)) ^ 1][:, None], both), axis=1)


@functools.lru_cache(maxsize=4)
def beta_quantiles(alpha: float) -> Indices:
    """QUANTILES equally likely values of Beta(alpha, alpha), ascending, in units of 1 / ONE; alpha in (0, 100].

    A random entry of this table is a draw from the distribution, which needs one random number and no rejection.
    """
    # The density is integrated from 0 to 1/2 by the midpoint rule, after the substitution x = u^(1 / e), which removes
    # its pole at 0. The upper half of the table is the mirror image of the lower half.
    e = min(alpha, 1.0)
    edges = np.linspace(0, 0.5**e, 1 + 2**14)
    x = ((edges[1:] + edges[:-1]) / 2) ** (1 / e)
    reached = np.concatenate(([0.0], np.cumsum(x ** (alpha - e) * (1 - x) ** (alpha - 1))))
    wanted = (np.arange(QUANTILES // 2) + 0.5) / (QUANTILES // 2) * reached[-1]
    lower = np.rint(np.interp(wanted, reached, edges) ** (1 / e) * ONE).astype(np.int64)
    return np.concatenate((lower, ONE - lower[::-1]))


# -- rectangles that are set to the mean -------------------------------------------------------------------------------


def _cutout(augmentation: Augmentation, draws: Draws) -> Indices:
    """Top and left edge of the cutout's square, int64 [n, 2]; the square lies inside of the image."""
    places = max(1, draws.size - augmentation.cutout + 1)
    return np.stack([draws.integers(axis, places) for axis in (0, 1)], axis=1)


def _erase(augmentation: Augmentation, whether: Draws, where: Draws) -> Table:
    asked = whether.uniforms(1)[0] < augmentation.erase
    rectangles = _rectangles(where, where.size, ERASED_AREAS, ERASED_SHAPES)
    return np.where(asked[:, None], rectangles, 0).astype(np.int32)


# To add an augmentation, add its setting, its record here, and its kernel, if it needs one, in pixels.py. Records are
# carried out in this order, and checksums cover their tables in this order: add records, but never reorder them.
RECORDS = (
    Record("crop", (), (Stream.CROP,), Place.MOVE, _crop),
    Record("scale", ("scale",), (Stream.SCALE,), Place.MOVE, _part),
    Record("affine", ("affine",), (Stream.AFFINE,), Place.AFFINE, _affine),
    Record("shift", ("shift",), (Stream.SHIFT,), Place.MOVE, _shift),
    Record("flip", ("flip",), (Stream.FLIP,), Place.MOVE, _flip),
    Record("jitter", ("jitter",), (Stream.JITTER,), Place.BYTES, _jitter, kernel="jitter_pixels"),
    Record("mix", ("mixup", "cutmix"), (Stream.MIX,), Place.BYTES, _mix, kernel="mix_pixels"),
    Record("cutout", ("cutout",), (Stream.CUTOUT,), Place.MOVE, _cutout),
    Record("erase", ("erase",), (Stream.ERASE, Stream.ERASED), Place.BLANK, _erase),
)
