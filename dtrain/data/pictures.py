"""Pictures: one rule from any file that Pillow reads to uint8 [S, S, 3], and what a source of them is.

In this order, with whole numbers throughout, so that a file gives the same bytes on every machine with this Pillow:

1. Of an animation or of several pages the first. What the file holds decides, not the ending of its name.
2. 16 bits a channel: the upper 8, as Pillow itself does for colours. Floats and larger numbers are refused.
3. 1-bit and palette images: the values they stand for. CMYK, YCbCr, LAB: Pillow's plain conversion; colour profiles
   are not applied.
4. Transparency (alpha, a colour key, palette entries) is laid over white, on which such pictures are mostly shown.
5. Turned and mirrored as EXIF says.
6. `crop`: the short side to S, the middle kept. `squash`: both sides to S. Bicubic, antialiased. S x S stays as it is.

Gray becomes R = G = B. A picture of more than 178,956,970 pixels is refused by Pillow as a possible decompression bomb.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from dtrain.config import OWN_SIZE
from dtrain.errors import DataError

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Decode = Callable[[], Pixels]

PHOTOGRAPH_SIZE = 224  # what most published networks for photographs are trained at
WHITE = 255
TURNS = {  # EXIF's orientation, and what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPicture(DataError):
    """One picture that cannot be decoded; under `--bad-images skip` it is left out."""

    def __init__(self, where: str, name: str, reason: str) -> None:
        super().__init__(
            f"{where}: {name} cannot be decoded ({reason}); replace or remove it, or give --bad-images skip"
        )
        self.name, self.reason = name, reason


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a source. labels: int64 [N], of all that is listed.

    pictures(): a fresh stream of N functions in the labels' order, each of which gives its picture as uint8 [S, S, 3]
    or raises BadPicture. The stream reads; the functions compute, and may be called in any thread.
    """

    labels: Labels
    pictures: Callable[[], Iterator[Decode]]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that is not converted yet; splits always has "train" and "test".

    image_size: side S of its pictures. digest: see `sources.digest_of`. passed_by: files that are no pictures.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: int
    digest: str
    splits: dict[str, Split]
    passed_by: tuple[str, ...] = ()


def common_size(sizes: Iterator[tuple[int, int]], largest: int = OWN_SIZE) -> int:
    """The side that pictures of these (width, height) keep if all are equal squares up to `largest`; else 224.

    Asks for no more sizes than it takes to know.
    """
    first = next(sizes, (0, 0))
    if not 0 < first[0] == first[1] <= largest or any(size != first for size in sizes):
        return PHOTOGRAPH_SIZE
    return first[0]


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of a picture, from its head alone; None for what is no picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # Pillow's readers raise nearly every kind: OSError, SyntaxError, struct.error, zlib.error
        return None


def picture(where: str, name: str, data: bytes, size: int, resize: str) -> Pixels:
    """The picture in a file's bytes, uint8 [size, size, 3], by the rule above. Raises BadPicture, naming it."""
    try:
        return fitted(_decoded(data, size), size, resize)
    except Exception as error:
        reason = "no picture that Pillow knows" if "cannot identify" in str(error) else str(error) or repr(error)
        raise BadPicture(where, name, " ".join(reason.split())) from error


def _decoded(data: bytes, size: int) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        # a large JPEG is halved while it is decoded, down to three times the size: several times faster, and the levels
        # move by 0.5 on average, a third of what lies between bicubic and Lanczos (at twice the size: by 1.6)
        image.draft(None, (3 * size, 3 * size))
        image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # damaged EXIF turns nothing
            orientation = None
        plain = _over_white(_eight_bits(image))
    return plain.transpose(TURNS[orientation]) if orientation in TURNS else plain


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point values; convert it to 8 or 16 bits a channel")
    if image.mode[0] != "I":
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("values beyond 16 bits; convert it to 8 or 16 bits a channel")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    """As mode L or RGB."""
    gray = image.mode in ("1", "L", "LA")
    if not image.has_transparency_data:
        return image.convert("L" if gray else "RGB")
    *colours, alpha = np.moveaxis(np.asarray(image.convert("LA" if gray else "RGBA")).astype(np.int32), 2, 0)
    mixed = [((c * alpha + WHITE * (255 - alpha) + 127) // 255).astype(np.uint8) for c in colours]
    return Image.fromarray(mixed[0] if gray else np.stack(mixed, axis=2))


def fitted(image: Image.Image, size: int, resize: str) -> Pixels:
    """An image of mode L or RGB as uint8 [size, size, 3]."""
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        kept = (left, top, left + side, top + side) if resize == "crop" else None
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=kept)
    return np.asarray(image.convert("RGB"))


def from_image(image: Image.Image, size: int, resize: str) -> Pixels:
    """A Pillow image of any mode as uint8 [size, size, 3], by the rule above from its second point on."""
    return fitted(_over_white(_eight_bits(image)), size, resize)


def gray(image: Pixels) -> Pixels:
    """uint8 [H, W] as uint8 [H, W, 3]."""
    return np.repeat(image[:, :, None], 3, axis=2)


def from_array(pixels: Pixels, size: int, resize: str) -> Pixels:
    """uint8 [H, W, 3] as uint8 [size, size, 3]: itself where that is its size."""
    return pixels if pixels.shape[:2] == (size, size) else fitted(Image.fromarray(pixels), size, resize)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pillow warns of odd EXIF, of palettes and of large pictures, a line each; what matters to us it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
