"""Settings of the augmentation. Every random number in it is a function of seed, epoch and sample (data/augment.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtrain.settings.values import Panel, Unfit, numbers, setting, within


def _areas(values: tuple[float, ...]) -> None:
    give = "the least and the largest fraction of the area, in 0.01..1, such as 0.35,1"
    numbers((1, 2), (0.01, 1), (0.01, 1), give=give)(values)
    if values[0] > values[-1]:
        raise Unfit(f"give {give}")


@dataclass(frozen=True)
class Augmentation(Panel):
    """The augmentations and how strong each is.

    scale, affine and jitter may be given in a short form; as attributes they always have two, four and three numbers.
    """

    title: ClassVar[str] = "Augmentation of training images"
    attribute: ClassVar[str] = "augmentation"

    flip: bool = setting(False, "random horizontal flip of half of the images")
    shift: int = setting(
        0,
        "random shift by up to this many pixels in each direction; what lies outside of the stored image is black",
        within("[0, 4096]"),
    )
    cutout: int = setting(
        0,
        "cutout: side in pixels of a square at a random place that is set to the mean colour; 0 for none",
        within("[0, 4096]"),
    )
    scale: tuple[float, ...] | None = setting(
        None,
        "random resized crop: smallest and largest fraction of the image's area that is cropped, such as 0.35,1; the "
        "aspect ratio is drawn between 3:4 and 4:3 [default: no such crop]",
        _areas,
        whole=lambda values: (values[0], values[1] if len(values) == 2 else 1.0),
    )
    affine: tuple[float, ...] | None = setting(
        None,
        "random affine transform: largest rotation in degrees, translation as a fraction of the side, change of scale "
        "as a fraction, and shear in degrees, such as 15 or 15,0.1,0.1,5; what lies outside of the stored image is "
        "black [default: none]",
        numbers(
            (1, 2, 3, 4),
            *((0, 180), (0, 1), (0, 0.9), (0, 60)),
            give="up to four numbers: degrees in 0..180, fraction in 0..1, zoom in 0..0.9, shear in 0..60, such as "
            "15,0.1,0.1,5",
        ),
        whole=lambda values: (*values, 0.0, 0.0, 0.0)[:4],
    )
    jitter: tuple[float, ...] | None = setting(
        None,
        "colour jitter: largest change of brightness, contrast and saturation as fractions, such as 0.4,0.4,0.4, or "
        "one number for all three [default: none]",
        numbers((1, 3), *((0, 1),) * 3, give="one or three fractions in 0..1, such as 0.4,0.4,0.4"),
        whole=lambda values: (values * 3)[:3],
    )
    erase: float = setting(
        0.0,
        "random erasing: probability that a rectangle of 2 to 33 % of an image is set to the mean colour",
        within("[0, 1]"),
    )
    mixup: float = setting(
        0.0,
        "mixup: pairs of images and their labels are blended; the number is alpha of the Beta distribution of the "
        "blending weight, such as 0.2; 0 for none. Training accuracy then counts the label with the larger weight",
        within("[0, 100]"),
    )
    cutmix: float = setting(
        0.0,
        "cutmix: pairs of images exchange a rectangle, and their labels are blended in proportion to its area; the "
        "number is alpha of the Beta distribution of the area, such as 1; 0 for none. With --mixup as well, each pair "
        "gets one of the two at random",
        within("[0, 100]"),
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs. A label is then one share for each class, and not a class number."""
        return self.mixup > 0 or self.cutmix > 0
