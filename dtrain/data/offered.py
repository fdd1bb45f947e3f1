"""Data set plugins as sources: what the function of such a plugin returns is checked, and turned into a Source.

The contract stands in plugins/README.md. The function is somebody else's code, so everything that it returns is checked
where it is used, and whatever it raises becomes an error of one line that names its distribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from dtrain.data.pictures import (
    BadPicture,
    Decode,
    Labels,
    Pixels,
    Source,
    Split,
    common_size,
    from_array,
    from_image,
    gray,
)
from dtrain.errors import DataError, DtrainError
from dtrain.files import canonical_json
from dtrain.plugins import LOCAL, OURS, Plugin, identity
from dtrain.settings.data import LARGEST_SIZE, Conversion

PARTS = ("train", "test")
GIVE = "give uint8 [H, W], [H, W, 1] or [H, W, 3], or a Pillow image"


@dataclass(frozen=True, eq=False)
class Offer:
    """The mapping that a data set plugin returned.

    what: how error messages call the plugin. digest: 64 hex digits; a hash of the plugin's name, its options and the
    digest in the mapping, not of the pictures themselves. given: the mapping.
    """

    what: str
    digest: str
    given: Mapping[str, Any]

    @classmethod
    def of(cls, plugin: Plugin, options: Mapping[str, Any], given: Any) -> Offer:
        """Check the mapping as far as that needs no picture. Raises DataError."""
        if not isinstance(given, Mapping):
            raise DataError(f"{plugin.said} returns a {type(given).__name__}; {SEE}")
        if lacks := [name for name in ("digest", "class_names", *PARTS) if name not in given]:
            raise DataError(f"{plugin.said} returns a mapping without {' and '.join(lacks)}; {SEE}")
        if not isinstance(given["digest"], str) or not all(callable(given[part]) for part in PARTS):
            raise DataError(f"{plugin.said} must return text as digest and functions as train and test; {SEE}")
        # two distributions may offer one name, and a file that is tried out changes from one run to the next
        name = plugin.name if plugin.distribution == OURS else f"{plugin.distribution}::{plugin.name}"
        if plugin.version == LOCAL:
            name = f"{identity(plugin)} {plugin.value.rpartition(':')[2]}"
        told = f" {canonical_json({k: repr(v) for k, v in options.items()}).decode()}" if options else ""
        return cls(plugin.said, hashlib.sha256(f"{name} {given['digest']}{told}".encode()).hexdigest(), given)

    def source(self, name: str, asked: Conversion) -> Source:
        """The pictures as a source, in the size that is asked for, else in their own. Calls the mapping's functions.

        If no size is asked for and the mapping has no `image_size`, pictures are read until their common size is known.
        Raises DataError.
        """
        names = self.given["class_names"]
        class_names = tuple(map(str, self._run(lambda: list(names() if callable(names) else names))))
        labels = {part: self._labels(part, len(class_names)) for part in PARTS}
        size = asked.stored_size or self.given.get("image_size")
        if size is None:
            images = chain.from_iterable(self._images(part, len(labels[part])) for part in PARTS)
            size = common_size((_size(image) for image in images), LARGEST_SIZE)
        splits = {
            part: Split(labels[part], partial(self._stream, part, len(labels[part]), int(size), asked.resize))
            for part in PARTS
        }
        return Source(name, class_names, int(size), self.digest, splits)

    def _split(self, part: str) -> tuple[Any, Iterable[Any]]:
        labels, images = self._run(self.given[part], f"{part}() must return labels and pictures: ")
        return labels, images

    def _labels(self, part: str, classes: int) -> Labels:
        labels = self._run(lambda: np.asarray(self._split(part)[0]))
        if classes < 2 or labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
            raise DataError(
                f"{self.what}: {classes} classes and, in {part}, labels of {labels.dtype} {list(labels.shape)}; two "
                f"classes or more and a list of whole numbers are needed"
            )
        if not 0 <= labels.min() <= labels.max() < classes:
            raise DataError(f"{self.what}: {part} holds a label outside 0..{classes - 1}")
        whole: Labels = labels.astype(np.int64)
        return whole

    def _images(self, part: str, count: int) -> Iterator[Any]:
        """The pictures of a split as the plugin gives them. Raises DataError if there are not `count`."""
        images, given = self._run(lambda: iter(self._split(part)[1])), 0
        while (image := self._run(lambda: next(images, None))) is not None:
            given += 1
            if given > count:
                break
            yield image
        if given != count:
            raise DataError(f"{self.what}: {part} has {count} labels and {'more' if given > count else given} pictures")

    def _stream(self, part: str, count: int, size: int, resize: str) -> Iterator[Decode]:
        for number, image in enumerate(self._images(part, count)):
            yield partial(self._picture, f"picture {number} of {part}", image, size, resize)

    def _picture(self, name: str, image: Any, size: int, resize: str) -> Pixels:
        try:
            if isinstance(image, Image.Image):
                return from_image(image, size, resize)
            pixels = np.asarray(image)
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,)):
                raise ValueError(f"is {pixels.dtype} {list(pixels.shape)}; {GIVE}")
            wide = pixels if pixels.shape[2:] == (3,) else gray(pixels.reshape(pixels.shape[:2]))
            return from_array(wide, size, resize)
        except Exception as error:
            raise BadPicture(self.what, name, " ".join(str(error).split()) or repr(error)) from error

    def _run(self, call: Callable[[], Any], hint: str = "") -> Any:
        """Call foreign code; an exception becomes a DataError that names the plugin."""
        try:
            return call()
        except DtrainError:
            raise
        except Exception as error:
            raise DataError(f"{self.what}: {hint}{type(error).__name__}: {error}") from error


SEE = "plugins/README.md says what a data set returns"


def _size(image: Any) -> tuple[int, int]:
    """Width and height of a picture of a plugin; (0, 0) for what is no picture, which later fails to be decoded."""
    if isinstance(image, Image.Image):
        return image.size
    shape = np.shape(image)
    return (shape[1], shape[0]) if len(shape) in (2, 3) else (0, 0)
