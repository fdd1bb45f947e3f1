"""What happens to a training image, decided by keys: small tables of integers, which `pixels.py` carries out.

Order of operations, fixed:
1. the part of the stored image that is shown: --scale draws its area and shape, else a crop of the size that comes out
2. affine map about the middle of that part: rotation, translation, scale, shear
3. shift
4. flip, left to right
5. gray, where one channel is wanted
6. jitter: brightness, then contrast, then saturation
7. mixing with the partner: positions 2i and 2i + 1 of the global batch are partners
8. normalisation
9. cutout, then erasing: a square and a rectangle are set to the mean

1 to 4 are one map from the pixels that come out to places in the stored image; a place between pixels is their bilinear
mix. Where a shift or a rotation looks beyond the part that is shown, it sees what is stored there, and black outside of
that. Up to 7 all is arithmetic on bytes and integers, so every back end gives equal bits; what has to be worked out in
floats (roots, cosines, quantiles) is rounded to integers here.
Legend: n images, S the side of an image that comes out; ONE = 2^16 is the unit of fractions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.config import TrainConfig
from dtrain.keyed import Stream, integers, key, uniforms

Table = npt.NDArray[np.int32]
Indices = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

ONE = 1 << 16  # 1 in the fixed point of maps, factors and shares
SHAPES = (3 / 4, 4 / 3)  # width over height of a part that is shown, as in Szegedy et al. 2015
ERASED_AREAS, ERASED_SHAPES = (0.02, 1 / 3), (0.3, 10 / 3)  # Zhong et al. 2017, "Random Erasing", as torchvision has it
QUANTILES = 4096  # values that a share of a mixture may take


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; what is left out is not done.

    shift: pixels each way. cutout: side of the square in pixels. scale: least and largest part of the area that is
    shown. affine: degrees, fraction of S, fraction, degrees of shear, each both ways. jitter: of brightness, contrast,
    saturation. erase: probability. mixup, cutmix: alpha of Beta(alpha, alpha), which a share is drawn from.
    """

    seed: int
    flip: bool = False
    shift: int = 0
    cutout: int = 0
    scale: tuple[float, float] | None = None
    affine: tuple[float, float, float, float] | None = None
    jitter: tuple[float, float, float] | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Augmentation:
        """The augmentation that a run's settings ask for."""
        scale, affine, jitter = config.scale, config.affine, config.jitter
        return cls(
            seed=config.seed,
            flip=config.flip,
            shift=config.shift,
            cutout=config.cutout,
            scale=(scale[0], scale[1] if len(scale) == 2 else 1.0) if scale else None,
            affine=(*affine, 0.0, 0.0, 0.0)[:4] if affine else None,  # type: ignore[arg-type]  # one to four numbers
            jitter=(jitter * 3)[:3] if jitter else None,  # type: ignore[arg-type]  # one number or three
            erase=config.erase,
            mixup=config.mixup,
            cutmix=config.cutmix,
        )

    @property
    def mixes(self) -> bool:
        """Whether images have partners: then a batch is even, and its labels are shares of the classes."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, eq=False)
class Decisions:
    """All that is decided for n images; None for what is not asked.

    moves: int32 [n, 5] of flip (0 or 1), dy, dx, cutout's top and left; dy, dx: where in the stored image the first row
    and column come from. cutout: side of the square, 0 for none.
    maps: int64 [n, 6] of xx, xy, x0, yx, yy, y0 in units of 1 / ONE, in the place of flip, dy and dx: pixel (x, y)
    shows what is stored at (xx x + xy y + x0, yx x + yy y + y0).
    factors: int32 [n, 3] of brightness, contrast, saturation, ONE for no change.
    mixtures: int64 [n, 6] of the partner's sample index, the own share in units of 1 / ONE, and top, left, height,
    width of what is cut out of the partner (height 0: blended).
    erasures: int32 [n, 4] of top, left, height, width, height 0 for none.
    """

    moves: Table
    cutout: int = 0
    maps: Indices | None = None
    factors: Table | None = None
    mixtures: Indices | None = None
    erasures: Table | None = None

    def columns(self) -> Iterator[npt.NDArray[Any]]:
        """Every column of every table, in the order above: what a checksum covers."""
        for table in (self.moves, self.maps, self.factors, self.mixtures, self.erasures):
            if table is not None:
                yield from table.T

    def of(self, part: slice) -> Decisions:
        """Those for a part of the images, which must not cut partners apart."""
        tables = (self.maps, self.factors, self.mixtures, self.erasures)
        return Decisions(self.moves[part], self.cutout, *(None if t is None else t[part] for t in tables))  # type: ignore[arg-type]  # each keeps its type


def decide(augmentation: Augmentation, epoch: int, indices: Indices, size: int, stored: int | None = None) -> Decisions:
    """The decisions for samples `indices`, int64 [n], in `epoch`; n is even where images are mixed.

    A key of (seed, stream, epoch, sample, n) each: of the sample, not of its place in a batch; of a pair its first
    sample. size: S; stored: the side of the stored images, in which a crop moves if it is larger.
    """
    draws = _Draws(augmentation.seed, epoch, indices.astype(np.uint64))
    stored = stored or size
    scale, affine, room = augmentation.scale, augmentation.affine, 0 if augmentation.scale else stored - size
    crop, shift = np.zeros((2, len(indices), 2), dtype=np.int64)
    moves = np.zeros((len(indices), 5), dtype=np.int32)
    if augmentation.flip:
        moves[:, 0] = draws.integers(Stream.FLIP, 0, 2)
    for axis in (0, 1):
        if room:
            crop[:, axis] = draws.integers(Stream.CROP, axis, room + 1)
        if augmentation.shift:
            shift[:, axis] = draws.integers(Stream.SHIFT, axis, 2 * augmentation.shift + 1) - augmentation.shift
        if augmentation.cutout:
            moves[:, 3 + axis] = draws.integers(Stream.CUTOUT, axis, max(1, size - augmentation.cutout + 1))
    moves[:, 1:3] = crop + shift
    maps = None
    if scale or affine:
        boxes = _rectangles(draws, Stream.SCALE, stored, scale, SHAPES) if scale else None
        if boxes is None:
            boxes = np.concatenate((crop, np.full_like(crop, size)), axis=1)
        maps = _maps(boxes, _affine(draws, affine, size) if affine else None, shift, moves[:, 0], size)
    return Decisions(
        moves,
        augmentation.cutout,
        maps,
        _factors(draws, augmentation.jitter) if augmentation.jitter else None,
        _mixtures(augmentation, epoch, indices, size) if augmentation.mixes else None,
        _erasures(draws, augmentation.erase, size) if augmentation.erase else None,
    )


def undecided(count: int, size: int, stored: int) -> Decisions:
    """What an evaluation does: the middle of each stored image, and nothing else."""
    moves = np.zeros((count, 5), dtype=np.int32)
    moves[:, 1:3] = (stored - size) // 2
    return Decisions(moves)


def mixed_labels(labels: Indices, mixtures: Indices, classes: int) -> npt.NDArray[np.float32]:
    """Shares of the classes, [n, K], that add up to exactly 1: the own class's, the rest the partner's class's."""
    rows, own = np.arange(len(labels)), (mixtures[:, 1] / ONE).astype(np.float32)
    shares = np.zeros((len(labels), classes), dtype=np.float32)
    shares[rows, labels] = own
    shares[rows, labels[rows ^ 1]] += 1 - own
    return shares


# -- one decision after the other --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """The keys of some samples in one epoch, as numbers."""

    seed: int
    epoch: int
    samples: npt.NDArray[np.uint64]

    def integers(self, stream: Stream, n: int, below: int) -> Indices:
        """The n-th draw of each sample, in [0, below)."""
        return integers(key(self.seed, stream, self.epoch, self.samples, n), below)

    def uniforms(self, stream: Stream, count: int) -> Reals:
        """The first `count` draws of each sample, in [0, 1), [count, n]."""
        return uniforms(key(self.seed, stream, self.epoch, self.samples, np.arange(count)[:, None]))


def _rectangles(
    draws: _Draws, stream: Stream, side: int, areas: tuple[float, float], shapes: tuple[float, float]
) -> Indices:
    """Rectangles in a square of `side` pixels: int64 [n, 4] of top, left, height, width.

    areas: fractions of the square, uniform. shapes: width over height, uniform in the logarithm, of those that fit into
    the square at that area; so no draw is ever rejected and areas stay as asked. Any place is as likely as another.
    """
    u_area, u_shape, u_top, u_left = draws.uniforms(stream, 4)
    area = areas[0] + (areas[1] - areas[0]) * u_area
    low, high = np.log(np.maximum(shapes[0], area)), np.log(np.minimum(shapes[1], 1 / area))
    shape = np.exp(low + (high - low) * u_shape)
    height = np.clip(np.rint(side * np.sqrt(area / shape)), 1, side)
    width = np.clip(np.rint(side * np.sqrt(area * shape)), 1, side)
    top, left = np.floor(u_top * (side - height + 1)), np.floor(u_left * (side - width + 1))
    return np.stack((top, left, height, width), axis=1).astype(np.int64)


def _affine(draws: _Draws, most: tuple[float, float, float, float], size: int) -> tuple[Reals, Reals]:
    """Where an affine map takes its pixels from, about the middle: matrices [2, 2, n] and translations [2, n] as x, y.

    The picture is sheared along its rows, scaled by 1 - most[2] to 1 + most[2], turned (clockwise if positive), moved.
    """
    degrees, x, y, scale, shear = 2 * draws.uniforms(Stream.AFFINE, 5) - 1
    turn, lean = np.radians(most[0] * degrees), np.tan(np.radians(most[3] * shear))
    zoom, cos, sin = 1 + most[2] * scale, np.cos(turn), np.sin(turn)
    inverse = np.array([[cos + lean * sin, sin - lean * cos], [-sin, cos]]) / zoom
    return inverse, most[1] * size * np.array([x, y])


def _maps(boxes: Indices, affine: tuple[Reals, Reals] | None, shift: Indices, flip: Table, size: int) -> Indices:
    """Flip, shift, affine map and box as one map from the pixels that come out to the stored image; see Decisions.

    From the middle of what comes out to the middle of the box, where fractions of whole numbers stay exact.
    """
    top, left, height, width = boxes.T
    dy, dx = shift.T
    mirror, middle = 1.0 - 2.0 * flip, (size - 1) / 2
    matrix, (moved_x, moved_y) = affine or (np.broadcast_to(np.eye(2)[..., None], (2, 2, len(flip))), (0.0, 0.0))
    rows: list[Any] = []
    for (along_x, along_y), begin, length in ((matrix[0], left, width), (matrix[1], top, height)):
        of_x, of_y = along_x * (length / size), along_y * (length / size)
        at_middle = begin + (length - 1) / 2 + of_x * (dx - moved_x) + of_y * (dy - moved_y)
        rows += [of_x * mirror, of_y, at_middle - (of_x * mirror + of_y) * middle]
    maps: Indices = np.rint(np.stack(rows, axis=1) * ONE).astype(np.int64)
    return maps


def _factors(draws: _Draws, jitter: tuple[float, float, float]) -> Table:
    spread = 2 * draws.uniforms(Stream.JITTER, 3).T - 1
    return np.rint((1 + np.array(jitter) * spread) * ONE).astype(np.int32)


def _erasures(draws: _Draws, probability: float, size: int) -> Table:
    asked = draws.uniforms(Stream.ERASE, 1)[0] < probability
    rectangles = _rectangles(draws, Stream.ERASED, size, ERASED_AREAS, ERASED_SHAPES)
    return np.where(asked[:, None], rectangles, 0).astype(np.int32)


def _mixtures(augmentation: Augmentation, epoch: int, indices: Indices, size: int) -> Indices:
    """Both of a pair have the same share and the same rectangle; see Decisions.

    mixup (Zhang et al. 2018) draws the share; cutmix (Yun et al. 2019) a square of that area about any pixel, of which
    what lies outside is lost. Where both are asked, each has half of the pairs.
    """
    draws = _Draws(augmentation.seed, epoch, indices[::2].astype(np.uint64))
    cut = np.full(len(draws.samples), augmentation.cutmix > 0)
    if augmentation.mixup and augmentation.cutmix:
        cut = draws.integers(Stream.MIX, 0, 2) == 1
    probability = draws.integers(Stream.MIX, 1, QUANTILES)
    own = np.zeros(len(draws.samples), dtype=np.int64)
    for alpha, its in ((augmentation.mixup, ~cut), (augmentation.cutmix, cut)):
        if alpha:
            own[its] = beta_quantiles(alpha)[probability[its]]
    side = np.where(cut, np.rint(size * np.sqrt(1 - own / ONE)), 0).astype(np.int64)
    edges = []
    for axis in (0, 1):
        begin = draws.integers(Stream.MIX, 2 + axis, size) - side // 2
        edges.append(np.clip((begin, begin + side), 0, size))
    (top, bottom), (left, right) = edges
    height, width = bottom - top, right - left
    own = np.where(cut, ONE - (ONE * height * width + size**2 // 2) // size**2, own)
    pairs = np.stack((own, top, left, height, width), axis=1).repeat(2, axis=0)
    return np.concatenate((indices[np.arange(len(indices)) ^ 1][:, None], pairs), axis=1)


@functools.lru_cache(maxsize=4)
def beta_quantiles(alpha: float) -> Indices:
    """QUANTILES values of Beta(alpha, alpha), equally likely, ascending, in units of 1 / ONE; alpha in (0, 100].

    A table and one key instead of rejection: no generator, and a draw costs what any other costs.
    """
    # the lower half by the midpoint rule, over u with x = u^(1 / e), which takes the pole at 0 away; the rest mirrored
    e = min(alpha, 1.0)
    edges = np.linspace(0, 0.5**e, 1 + 2**14)
    x = ((edges[1:] + edges[:-1]) / 2) ** (1 / e)
    reached = np.concatenate(([0.0], np.cumsum(x ** (alpha - e) * (1 - x) ** (alpha - 1))))
    wanted = (np.arange(QUANTILES // 2) + 0.5) / (QUANTILES // 2) * reached[-1]
    lower = np.rint(np.interp(wanted, reached, edges) ** (1 / e) * ONE).astype(np.int64)
    return np.concatenate((lower, ONE - lower[::-1]))
