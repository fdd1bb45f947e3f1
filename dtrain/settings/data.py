"""Which images are trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dtrain.errors import UsageError
from dtrain.settings.staged import Staged
from dtrain.settings.values import Panel, Unfit, numbers, setting, within

OWN_SIZE = 64  # a folder or tar of equal squares up to this side keeps it: small sets are drawn for their size
LARGEST_SIZE = 4096  # pixels a side, 48 MiB an image; what is larger is a slip of the keyboard


def _size(value: int) -> None:
    if not 1 <= value <= LARGEST_SIZE:
        raise Unfit(f"give a number in 1..{LARGEST_SIZE}")


def _deviations(values: tuple[float, ...]) -> None:
    numbers((1, 3), *((0, 1),) * 3, give="one number in 0..1 for each channel, such as 0.25,0.24,0.26")(values)
    if 0.0 in values:
        raise Unfit("give numbers greater than 0")


@dataclass(frozen=True)
class Conversion:
    """What a data set is converted to; two of these are two folders of betons.

    image_size, store_size: sides in pixels, None for what the source gives. The betons hold the larger one.
    """

    image_size: int | None = None
    resize: str = "crop"
    store_size: int | None = None
    bad_images: str = "stop"

    @property
    def stored_size(self) -> int | None:
        """The side in pixels of the images in the betons, None for what the source gives."""
        return self.store_size or self.image_size


@dataclass(frozen=True)
class Data(Panel):
    """The data set, its conversion, and how it is read."""

    title: ClassVar[str] = "Data"
    attribute: ClassVar[str] = "data"

    dataset: str = setting(
        "cifar10",
        "a data set that `dtrain plugins` lists, such as cifar10; or a folder or tar with train/CLASS/ and val/CLASS/ "
        "or test/CLASS/; or a folder with train.beton and val.beton or test.beton; or ./file.py:function",
    )
    dataset_opt: dict[str, str] = setting({}, "option of a named data set, as key=value; may be repeated", of="dataset")
    data_dir: Path = setting(Path("data"), "folder where named data sets are looked for and downloaded to", place=True)
    cache_dir: Path | None = setting(
        None, "folder where converted data sets are kept [default: the user's cache folder]", place=True
    )
    image_size: Staged | None = setting(
        None,
        "side in pixels of the images that the network sees; 16,32@4 changes it at epoch 4 [default: that of the data "
        f"set; for folders and tars 224, or their own where all images are equal squares of at most {OWN_SIZE} pixels]",
        lambda staged: _size(staged.largest),
    )
    resize: Literal["crop", "squash"] = setting(
        "crop",
        "how a picture becomes square: crop scales its short side and keeps the middle; squash scales both sides",
    )
    store_size: int | None = setting(
        None,
        "side in pixels of the stored images, out of which --image-size is cropped: at a random place in training, in "
        "the middle in an evaluation [default: the image size]",
        _size,
    )
    channels: Literal["auto", "1", "3"] = setting(
        "auto",
        "number of channels of the images that the network sees; auto takes 1 if every training image is gray and the "
        "architecture has the parameter in_channels, else 3",
    )
    bad_images: Literal["stop", "skip"] = setting(
        "stop", "what to do with a picture that cannot be decoded: end with an error, or leave it out and report it"
    )
    val_split: float | None = setting(
        None,
        "fraction of the training set that is held out and evaluated on, in place of the test set",
        within("(0, 1)"),
    )
    loader: Literal["auto", "ffcv", "memory"] = setting(
        "auto", "reader of the converted images; auto takes ffcv where it can be imported", place=True
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "mean of each channel in 0..1, comma-separated, for the normalisation [default: that of the training set]",
        numbers((1, 3), *((0, 1),) * 3, give="one number in 0..1 for each channel, such as 0.49,0.48,0.45"),
    )
    std: tuple[float, ...] | None = setting(
        None,
        "standard deviation of each channel in 0..1, comma-separated [default: that of the training set]",
        _deviations,
    )

    def check(self) -> None:
        """Images are cropped out of what is stored, so that must not be smaller."""
        least = self.image_size.largest if self.image_size else LARGEST_SIZE
        if self.store_size is not None and self.store_size < least:
            size = f"below --image-size {self.image_size}" if self.image_size else "needs an --image-size"
            raise UsageError(f"--store-size {self.store_size}: {size}; images are cropped out of what is stored")

    def conversion(self) -> Conversion:
        """What is asked of the data set's conversion."""
        largest = self.image_size.largest if self.image_size else None
        return Conversion(largest, self.resize, self.store_size, self.bad_images)
