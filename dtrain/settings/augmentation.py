"""What is done to training images. Every draw is a function of seed, epoch and sample (data/augment.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtrain.settings.values import Panel, Unfit, at_least, numbers, setting, within


def _areas(values: tuple[float, ...]) -> None:
    give = "the least and the largest fraction of the area, in 0.01..1, such as 0.35,1"
    numbers((1, 2), (0.01, 1), (0.01, 1), give=give)(values)
    if values[0] > values[-1]:
        raise Unfit(f"give {give}")


@dataclass(frozen=True)
class Augmentation(Panel):
    """Augmentation by name. scale, affine and jitter are kept whole: two, four and three numbers."""

    title: ClassVar[str] = "Augmentation of training images"
    attribute: ClassVar[str] = "augmentation"

    flip: bool = setting(False, "random horizontal flip of half of the images")
    shift: int = setting(0, "random shift by up to this many pixels in each direction; black comes in", at_least(0))
    cutout: int = setting(0, "cutout: side in pixels of a square that is set to the mean", at_least(0))
    scale: tuple[float, ...] | None = setting(
        None,
        "random resized crop: least and largest fraction of the area that is shown, such as 0.35,1; the aspect ratio "
        "is between 3:4 and 4:3",
        _areas,
        whole=lambda values: (values[0], values[1] if len(values) == 2 else 1.0),
    )
    affine: tuple[float, ...] | None = setting(
        None,
        "random affine map by up to: degrees of rotation, fraction of the side of translation, fraction of zoom, "
        "degrees of shear; such as 15 or 15,0.1,0.1,5; black comes in",
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
        "colour jitter: brightness, contrast and saturation change by up to these fractions, such as 0.4,0.4,0.4, or "
        "one number for all three",
        numbers((1, 3), *((0, 1),) * 3, give="one or three fractions in 0..1, such as 0.4,0.4,0.4"),
        whole=lambda values: (values * 3)[:3],
    )
    erase: float = setting(
        0.0,
        "random erasing: probability that a rectangle of 2 to 33 % of an image is set to the mean",
        within("[0, 1]"),
    )
    mixup: float = setting(
        0.0,
        "mixup: images are blended in pairs, and their labels; alpha of the Beta distribution of the share, such as "
        "0.2; training accuracy then counts the label with the larger share",
        within("[0, 100]"),
    )
    cutmix: float = setting(
        0.0,
        "cutmix: pairs of images exchange a rectangle, and labels in proportion; alpha, such as 1; together with "
        "--mixup each takes half of the pairs",
        within("[0, 100]"),
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs: labels are then shares of the classes."""
        return self.mixup > 0 or self.cutmix > 0
