"""Claims about the one rule from any picture file to RGB, S x S; on files of every kind, whole and broken."""

from __future__ import annotations

import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dtrain.data.pictures import BadPicture, Pixels, picture, quiet

WIDTH, HEIGHT = 120, 90  # of the scene in odd_images.tar
BROKEN = {"truncated.jpg", "header_only.jpg", "zero_bytes.jpg", "not_an_image.jpg", "truncated.png", "crc.png"}


@pytest.fixture(scope="module")
def odd(shared_data: Path) -> dict[str, bytes]:
    """The files of odd_images.tar by name."""
    files = {}
    with tarfile.open(shared_data / "odd_images.tar") as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            files[info.name] = file.read()
    return files


def seen(data: bytes, size: int | None = None, resize: str = "crop") -> Pixels:
    """A picture by the rule; without a size as large as the file of the scene is, squashed to a square to compare."""
    with quiet():
        return picture("pets.tar", "train/cat/1", data, size or HEIGHT, resize if size else "squash")


def saved(image: Image.Image, kind: str = "png", **how: Any) -> bytes:
    image.save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def square(pixels: npt.NDArray[Any]) -> bytes:
    return saved(Image.fromarray(pixels))


def apart(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


# -- kinds of files --------------------------------------------------------------------------------------------------


def test_every_whole_file_is_read_and_every_broken_one_refused_by_its_name(odd: dict[str, bytes]) -> None:
    assert len(odd) == 41
    refused = set()
    for name, data in odd.items():
        try:
            with quiet():
                pixels = picture("pets.tar", name, data, 64, "crop")
            assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
        except BadPicture as error:
            assert str(error).startswith(f"pets.tar: {name} cannot be decoded (")
            assert str(error).endswith("; replace or remove it, or give --bad-images skip")
            assert "\n" not in str(error)
            refused.add(name.removeprefix("broken_"))
    assert refused == BROKEN


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(odd: dict[str, bytes], turn: int) -> None:
    # DATA.md: upright they differ from the reference by what JPEG loses, 4.6 of 255
    assert apart(seen(odd[f"exif_orientation_{turn}.jpg"]), seen(odd["rgb_reference.png"])) < 6


@pytest.mark.parametrize(
    ("name", "like", "most"),
    [
        ("png_named.jpg", "rgb_reference.png", 0),
        ("lossless.webp", "rgb_reference.png", 0),
        ("rgb_16bit.png", "rgb_reference.png", 1),
        ("rgb.jpg", "rgb_reference.png", 6),
        ("rgb_progressive.jpg", "rgb_reference.png", 6),
        ("jpeg_trailing_garbage.jpg", "rgb.jpg", 0),
        ("UPPER CASE name é.JPG", "rgb_reference.png", 6),
        ("lossy.webp", "rgb_reference.png", 6),
        ("cmyk.jpg", "rgb_reference.png", 6),
        ("still.gif", "rgb_reference.png", 8),
        ("animated_2frames.gif", "palette.png", 0),  # its first frame
        ("gray.jpg", "gray.png", 3),
        ("small.bmp", "small.tif", 0),
    ],
)
def test_files_of_one_scene_give_one_picture(odd: dict[str, bytes], name: str, like: str, most: float) -> None:
    assert apart(seen(odd[name]), seen(odd[like])) <= most


@pytest.mark.parametrize("name", ["gray.png", "gray.jpg", "gray_16bit.png", "gray_alpha.png", "bilevel_1bit.png"])
def test_gray_files_become_three_equal_channels(odd: dict[str, bytes], name: str) -> None:
    pixels = seen(odd[name])
    assert (pixels == pixels[..., :1]).all()
    assert pixels.max() > pixels.min()


def test_of_16_bits_the_upper_8_are_kept() -> None:
    values = np.array([[0, 255], [256, 65535]], np.uint16)
    wanted = [[0, 0], [1, 255]]
    for data in (square(values), saved(Image.fromarray(values.astype(np.int32)), "tiff")):
        assert seen(data, 2)[..., 0].tolist() == wanted


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.5, 1.0], [2.0, 3.0]], np.float32), "floating-point values"),
        (np.array([[0, 1], [2, 65536]], np.int32), "values beyond 16 bits"),
        (np.array([[0, 1], [2, -1]], np.int32), "values beyond 16 bits"),
    ],
)
def test_what_has_no_8_bits_is_refused(values: npt.NDArray[Any], reason: str) -> None:
    with pytest.raises(BadPicture, match=reason):
        seen(saved(Image.fromarray(values), "tiff"), 2)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "1", "L", "RGB", "P"])
def test_what_is_transparent_is_white_and_what_is_half_so_is_halfway(mode: str) -> None:
    """A black picture of four pixels: transparent, transparent, opaque, opaque; half transparent where alpha allows."""
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (2, 2))
        alphas = [0, 128, 255, 255]
        image.putalpha(Image.fromarray(np.array(alphas, np.uint8).reshape(2, 2)))
        data, wanted = saved(image), [255, 127, 0, 0]  # 255 x (255 - 128) / 255
    elif mode == "P":
        image = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8))
        image.putpalette([0, 0, 0] * 3)
        data, wanted = saved(image, transparency=bytes([0, 128, 255])), [255, 127, 0, 0]
    else:  # one value, or colour, is declared transparent
        values = np.array([[255, 255], [0, 0]], np.uint8)
        image = Image.fromarray(np.repeat(values[..., None], 3, axis=2) if mode == "RGB" else values).convert(mode)
        data, wanted = saved(image, transparency=(0, 0, 0) if mode == "RGB" else 0), [255, 255, 255, 255]
    assert seen(data, 2)[..., 0].ravel().tolist() == wanted
    assert seen(data, 2).max(axis=2).tolist() == seen(data, 2).min(axis=2).tolist()


@pytest.mark.parametrize(
    "name",
    [
        *("rgba.png", "rgba.webp", "gray_alpha.png", "rgb_trns_colour_key.png"),
        *("palette_transparent.png", "palette_transparent_index.png"),
    ],
)
def test_transparent_files_are_laid_over_white_as_pillow_does_it(odd: dict[str, bytes], name: str) -> None:
    with quiet(), Image.open(io.BytesIO(odd[name])) as image:
        white = Image.new("RGBA", image.size, "white")
        laid = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    wanted = np.asarray(laid.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC))
    assert np.abs(seen(odd[name]).astype(int) - wanted.astype(int)).max() <= 1


# -- square ----------------------------------------------------------------------------------------------------------


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    for resize in ("crop", "squash"):
        assert np.array_equal(seen(square(pixels), 7, resize), pixels)


def test_crop_keeps_the_middle_and_squash_keeps_all() -> None:
    # three squares side by side: red, green, blue
    pixels = np.zeros((10, 30, 3), np.uint8)
    for part in range(3):
        pixels[:, 10 * part : 10 * part + 10, part] = 255
    cropped, squashed = seen(square(pixels), 6), seen(square(pixels), 6, "squash")
    assert (cropped[:, 1:5] == [0, 255, 0]).all()
    assert [int(squashed[3, x].argmax()) for x in (0, 1, 3, 4, 5)] == [0, 0, 1, 2, 2]
    tall = seen(square(pixels.transpose(1, 0, 2).copy()), 6)
    assert np.array_equal(tall, cropped.transpose(1, 0, 2))


@pytest.mark.parametrize(("width", "height"), [(300, 200), (201, 333), (64, 90), (31, 20)])
def test_crop_is_the_largest_square_in_the_middle_resampled_by_pillow(width: int, height: int) -> None:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([127 + 100 * np.sin(x / 20), 127 + 100 * np.cos(y / 15), 255 * x / width], axis=2).astype(
        np.uint8
    )
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2  # may be half a pixel
    box = (left, top, left + side, top + side)
    wanted = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(seen(square(pixels), 48), np.asarray(wanted))


def test_enlarging_reducing_and_half_decoding_keep_the_mean(odd: dict[str, bytes]) -> None:
    wanted = np.asarray(Image.open(io.BytesIO(odd["rgb_reference.png"])).convert("RGB")).mean((0, 1))
    for name in ("rgb_reference.png", "rgb.jpg"):
        for size in (15, 45, 300):  # 15: the JPEG is decoded at half its size
            assert np.abs(seen(odd[name], size, "squash").mean((0, 1)) - wanted).max() < 3


def test_the_same_file_gives_the_same_bytes(odd: dict[str, bytes]) -> None:
    for name in ("rgb.jpg", "wide_300x2.png", "one_pixel.png"):
        assert np.array_equal(seen(odd[name], 50), seen(odd[name], 50))


# -- warnings and limits ---------------------------------------------------------------------------------------------


def test_a_picture_beyond_pillows_limit_is_refused_and_below_it_nobody_is_warned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = square(np.zeros((10, 10, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 49)  # Pillow warns above, and refuses above twice as many
    with pytest.raises(BadPicture, match="exceeds limit of 98 pixels, could be decompression bomb"):
        seen(data, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert seen(data, 4).shape == (4, 4, 3)
    assert told == []


def test_damaged_exif_turns_nothing(odd: dict[str, bytes]) -> None:
    exif = odd["exif_orientation_6.jpg"]
    at = exif.index(b"Exif\0\0")
    assert seen(exif[: at + 6] + b"\xff" * 8 + exif[at + 14 :], 50).shape == (50, 50, 3)
