"""How any image file that Pillow can read becomes uint8 [S, S, 3], and what a source of such pictures is.

The conversion has these steps. All of them use integer arithmetic, so a file gives the same bytes on every machine with
the same version of Pillow.

1. Of an animation, or of a file with several pages, the first one is taken. The content of the file decides what it is,
   not the ending of its name.
2. Of 16 bits a channel the upper 8 are kept, as Pillow itself does for colours. Floating-point values and larger
   integers are refused.
3. Pixels of 1-bit and palette images become the values they stand for. CMYK, YCbCr and LAB are converted by Pillow;
   colour profiles are not applied.
4. Transparency (an alpha channel, a transparent colour, transparent palette entries) is blended with white.
5. The picture is rotated and mirrored as its EXIF data say.
6. `crop` scales the shorter side to S and keeps the middle of the longer one; `squash` scales both sides to S. The
   filter is bicubic with antialiasing. A picture of S x S stays as it is.

Gray becomes R = G = B. Pillow refuses pictures of more than 178,956,970 pixels, as a protection of the memory.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from dtrain.errors import DataError
from dtrain.settings.data import OWN_SIZE

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Decode = Callable[[], Pixels]

PHOTOGRAPH_SIZE = 224  # the image size at which most published networks for photographs are trained
WHITE = 255
# EXIF's orientation, and the transposition that undoes it. ImageOps.exif_transpose also writes the EXIF data anew; that
# fails for some files with odd entries, which can be turned all the same.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPicture(DataError):
    """One picture that cannot be decoded. It ends the conversion, or is left out with `--bad-images skip`."""

    def __init__(self, where: str, name: str, reason: str) -> None:
        super().__init__(
            f"{where}: {name} cannot be decoded ({reason}); replace or remove it, or give --bad-images skip"
        )
        self.name, self.reason = name, reason


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a source, such as the training set.

    labels: int64 [N], one for each picture. pictures(): returns a new stream of N functions, in the order of the
    labels, each of which returns its picture as uint8 [S, S, 3] or raises BadPicture. Iterating over the stream reads
    the files; the functions only decode, and may be called in any thread.
    """

    labels: Labels
    pictures: Callable[[], Iterator[Decode]]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that has not been converted yet. Its splits are "train" and "test".

    image_size: the side S of its pictures, in pixels. digest: see `sources.digest_of`. passed_by: names of the files
    that were ignored because they are not pictures.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: int
    digest: str
    splits: dict[str, Split]
    passed_by: tuple[str, ...] = ()


def common_size(sizes: Iterator[tuple[int, int]], largest: int = OWN_SIZE) -> int:
    """The image size of a set of pictures, in pixels: their own side if all are equal squares of at most `largest`
    pixels, else 224.

    sizes: (width, height) of each; it is read only as far as needed.
    """
    first = next(sizes, (0, 0))
    if not 0 < first[0] == first[1] <= largest or any(size != first for size in sizes):
        return PHOTOGRAPH_SIZE
    return first[0]


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of a picture in pixels, read from the head of the file; None if it is not a picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:  # Pillow's readers raise nearly every kind: OSError, SyntaxError, struct.error, zlib.error
        return None


def picture(where: str, name: str, data: bytes, size: int, resize: str) -> Pixels:
    """Decode the bytes of a file into uint8 [size, size, 3], by the steps above. resize: crop or squash.

    where, name: names of the data set and of the file, for errors. Raises BadPicture.
    """
    try:
        return fitted(_decoded(data, size), size, resize)
    except Exception as error:
        reason = "no picture that Pillow knows" if "cannot identify" in str(error) else str(error) or repr(error)
        raise BadPicture(where, name, " ".join(reason.split())) from error


def _decoded(data: bytes, size: int) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        # A large JPEG is decoded at a half, a quarter or an eighth of its size, though at no less than three times the
        # wanted size. This is several times faster. It changes values by 0.5 of 255 on average, a third of the
        # difference between bicubic and Lanczos; with no less than twice the wanted size it would be 1.6.
        image.draft(None, (3 * size, 3 * size))
        image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:  # a picture with damaged EXIF data is not turned
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
    """The image in mode L or RGB, transparency blended with white."""
    gray = image.mode in ("1", "L", "LA")
    if not image.has_transparency_data:
        return image.convert("L" if gray else "RGB")
    *colours, alpha = np.moveaxis(np.asarray(image.convert("LA" if gray else "RGBA")).astype(np.int32), 2, 0)
    mixed = [((c * alpha + WHITE * (255 - alpha) + 127) // 255).astype(np.uint8) for c in colours]
    return Image.fromarray(mixed[0] if gray else np.stack(mixed, axis=2))


def fitted(image: Image.Image, size: int, resize: str) -> Pixels:
    """An image of mode L or RGB as uint8 [size, size, 3], cropped or squashed to a square."""
    square = (size, size)
    if resize == "crop":
        image = ImageOps.fit(image, square, Image.Resampling.BICUBIC)
    else:
        image = image.resize(square, Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def from_image(image: Image.Image, size: int, resize: str) -> Pixels:
    """A Pillow image of any mode as uint8 [size, size, 3], by the steps 2, 3, 4 and 6 above."""
    return fitted(_over_white(_eight_bits(image)), size, resize)


def gray(image: Pixels) -> Pixels:
    """uint8 [H, W] as uint8 [H, W, 3]."""
    return np.repeat(image[:, :, None], 3, axis=2)


def from_array(pixels: Pixels, size: int, resize: str) -> Pixels:
    """A decoded picture, uint8 [H, W, 3], as uint8 [size, size, 3]; the array itself if it has that size."""
    return pixels if pixels.shape[:2] == (size, size) else fitted(Image.fromarray(pixels), size, resize)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings about odd EXIF data, palettes and large pictures; real problems are still errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
