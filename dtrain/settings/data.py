"""Settings of the data set: which images are used for training and evaluation, and how they are converted and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dtrain.errors import UsageError
from dtrain.settings.staged import Staged
from dtrain.settings.values import Panel, Unfit, numbers, setting, within

# in pixels; a folder or tar of squares that all have the same side, up to this one, keeps that side as its image size:
# such small images were made for the size they have
OWN_SIZE = 64
LARGEST_SIZE = 4096  # pixels a side, 48 MiB an image; a larger value is taken to be a typing error


def _size(value: int) -> None:
    if not 1 <= value <= LARGEST_SIZE:
        raise Unfit(f"give a number in 1..{LARGEST_SIZE}")


def _deviations(values: tuple[float, ...]) -> None:
    numbers((1, 3), *((0, 1),) * 3, give="one number in 0..1 for each channel, such as 0.25,0.24,0.26")(values)
    if 0.0 in values:
        raise Unfit("give numbers greater than 0")


@dataclass(frozen=True)
class Conversion:
    """How a data set is converted. Each different conversion has a folder of its own in the cache.

    image_size, store_size: sides in pixels; None for the size of the source. The converted files hold the larger one.
    """

    image_size: int | None = None
    resize: str = "crop"
    store_size: int | None = None
    bad_images: str = "stop"

    @property
    def stored_size(self) -> int | None:
        """The side in pixels of the images in the converted files (betons); None for the size of the source."""
        return self.store_size or self.image_size


@dataclass(frozen=True)
class Data(Panel):
    """The data set, its conversion, and how it is read."""

    title: ClassVar[str] = "Data"
    attribute: ClassVar[str] = "data"

    dataset: str = setting(
        "cifar10",
        "data set: a name that `dtrain plugins` lists, or ./file.py:function; or a folder or tar file with "
        "train/CLASS/ and test/CLASS/ (or val/CLASS/); or a folder with files in FFCV's format, train.beton and "
        "test.beton (or val.beton)",
    )
    dataset_opt: dict[str, str] = setting(
        {}, "option of a named data set or a function, as key=value; may be repeated", of="dataset"
    )
    data_dir: Path = setting(Path("data"), "folder where named data sets are looked for and downloaded to", place=True)
    cache_dir: Path | None = setting(
        None, "folder where converted data sets are kept [default: the user's cache folder]", place=True
    )
    image_size: Staged | None = setting(
        None,
        "side in pixels of the square images that the network is given; 16,32@4 means 16 at first and 32 from epoch 4 "
        "on, counted from 0 [default: that of the data set; for a folder or tar 224, unless all its images are squares "
        f"of the same size and at most {OWN_SIZE} pixels wide, which keep their size]",
        lambda staged: _size(staged.largest),
    )
    resize: Literal["crop", "squash"] = setting(
        "crop",
        "how an image becomes square: crop scales its shorter side to the image size and cuts the ends of the longer "
        "one off; squash scales both sides to the image size, which changes the aspect ratio",
    )
    store_size: int | None = setting(
        None,
        "side in pixels of the converted images in the cache; if it is larger than --image-size, each image is "
        "cropped, at a random place in training and in the middle in an evaluation [default: the image size]",
        _size,
    )
    channels: Literal["auto", "1", "3"] = setting(
        "auto",
        "number of channels of the images that the network is given; auto takes 1 if every training image is gray and "
        "the architecture has the parameter in_channels, else 3",
    )
    bad_images: Literal["stop", "skip"] = setting(
        "stop",
        "what to do with an image file that cannot be decoded: stop ends with an error, skip leaves it out and says so",
    )
    val_split: float | None = setting(
        None,
        "fraction of the training set that is held out and evaluated on in place of the test set [default: evaluate on "
        "the test set]",
        within("(0, 1)"),
    )
    loader: Literal["auto", "ffcv", "memory"] = setting(
        "auto",
        "reader of the converted images: FFCV, or dtrain's own, which maps the file into memory; both give the same "
        "images; auto takes ffcv if it can be imported",
        place=True,
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "mean of each channel for the normalisation, in 0..1, comma-separated [default: that of the training set]",
        numbers((1, 3), *((0, 1),) * 3, give="one number in 0..1 for each channel, such as 0.49,0.48,0.45"),
    )
    std: tuple[float, ...] | None = setting(
        None,
        "standard deviation of each channel for the normalisation, in 0..1, comma-separated [default: that of the "
        "training set]",
        _deviations,
    )

    def check(self) -> None:
        """Raise UsageError if the stored images, from which images are cropped, would be smaller than the images."""
        least = self.image_size.largest if self.image_size else LARGEST_SIZE
        if self.store_size is not None and self.store_size < least:
            size = f"below --image-size {self.image_size}" if self.image_size else "needs an --image-size"
            raise UsageError(f"--store-size {self.store_size}: {size}; images are cropped out of what is stored")

    def conversion(self) -> Conversion:
        """How these settings ask for the data set to be converted."""
        largest = self.image_size.largest if self.image_size else None
        return Conversion(largest, self.resize, self.store_size, self.bad_images)
