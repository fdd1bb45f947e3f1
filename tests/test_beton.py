"""Claims about betons: FFCV's bytes, the same twice; raw or JPEG; the facts beside them; `dtrain data`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from betons import (
    CLASSES,
    COUNT,
    HEAD,
    SIZE,
    Pixels,
    converted,
    edit,
    finished,
    number,
    pixels_in,
    pixels_of,
    smooth,
    source_of,
)
from needs import need_ffcv

from dtrain.commands import data
from dtrain.data.beton import open_beton, verify_beton
from dtrain.data.cache import convert
from dtrain.data.format import ALLOCATION, FIELD, HEADER, PAGE, SAMPLE, VERSION
from dtrain.data.loader import open_loader
from dtrain.errors import DataError, UsageError
from dtrain.settings.data import Data


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound beton; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("sound")
    converted(folder, source_of(pixels_of(COUNT), pixels_of(COUNT)[:20]))
    return folder


# -- against FFCV ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ffcv() -> Iterator[None]:
    """FFCV, imported through our one door, which keeps that cheap and without traces."""
    need_ffcv()
    import dtrain.data.ffcv_reader  # noqa: F401

    yield
    from tqdm import tqdm

    if tqdm.monitor is not None:  # the thread behind the bar of FFCV's writer
        tqdm.monitor.exit()
        tqdm.monitor = None


@pytest.mark.usefixtures("ffcv")
def test_the_types_of_the_format_are_those_of_ffcv() -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
    from ffcv.writer import MIN_PAGE_SIZE

    theirs = [HeaderType, FieldDescType, ALLOC_TABLE_TYPE, get_metadata_type([RGBImageField(), IntField()])]
    for ours, other in zip([HEADER, FIELD, ALLOCATION, SAMPLE], theirs, strict=True):
        assert shape_of(ours) == shape_of(other)
    assert (VERSION, PAGE) == (CURRENT_VERSION, MIN_PAGE_SIZE)


def shape_of(dtype: np.dtype[Any]) -> Any:
    """A structured type as nested (offset, type), without names."""
    if dtype.fields is None:
        return dtype.str if dtype.subdtype is None else dtype
    return dtype.itemsize, [(offset, shape_of(field)) for field, offset, *_ in dtype.fields.values()]


class Indexed:
    """What FFCV's writer takes."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        return self.pixels[index], index * 7 % 3


def written_by_ffcv(path: Path, pixels: Pixels) -> Path:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):  # its bar
        DatasetWriter(str(path), fields, page_size=PAGE, num_workers=1).from_indexed_dataset(Indexed(pixels))
    return path


@pytest.mark.usefixtures("ffcv")
def test_our_writer_writes_the_bytes_of_ffcvs_writer(sound: Path, tmp_path: Path) -> None:
    theirs = written_by_ffcv(tmp_path / "train.beton", pixels_of(COUNT)).read_bytes()
    assert (sound / "train.beton").read_bytes() == theirs


@pytest.mark.usefixtures("ffcv")
def test_our_reader_reads_what_ffcv_wrote(sound: Path, tmp_path: Path) -> None:
    path = written_by_ffcv(tmp_path / "train.beton", pixels_of(COUNT))
    shutil.copy(sound / "train.json", tmp_path)
    beton = open_beton(path)
    assert np.array_equal(beton.labels, np.arange(COUNT) * 7 % 3)
    assert np.array_equal(pixels_in(beton), pixels_of(COUNT))


@pytest.mark.usefixtures("ffcv")
@pytest.mark.parametrize(("count", "size"), [(COUNT, SIZE), (1, 1), (3, 837)])  # an image of 837 x 837 fills no page
def test_ffcvs_loader_reads_what_we_wrote(tmp_path: Path, count: int, size: int) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    pixels = pixels_of(count, size)
    path = converted(tmp_path, source_of(pixels, pixels[:1])).path
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(
        str(path), batch_size=100, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines
    )
    batches = iter(loader)
    images, labels = zip(*((image.copy(), label.copy()) for image, label in batches), strict=True)
    batches.join()
    assert np.array_equal(np.concatenate(images), pixels)
    assert np.concatenate(labels).ravel().tolist() == (np.arange(count) * 7 % 3).tolist()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_beton_holds_the_pixels_labels_and_facts_of_its_source(sound: Path) -> None:
    beton, pixels = open_beton(sound / "train.beton"), pixels_of(COUNT)
    assert np.array_equal(pixels_in(beton), pixels)
    assert np.array_equal(beton.labels, np.arange(COUNT) * 7 % 3)
    assert (beton.class_names, beton.image_size, beton.channels, beton.split) == (CLASSES, SIZE, 3, "train")
    np.testing.assert_allclose(beton.mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(beton.std, (pixels / 255).std((0, 1, 2)), rtol=1e-9)
    told = subprocess.run(["sha256sum", beton.path], capture_output=True, text=True, check=True).stdout
    assert told.split()[0] == beton.sha256


def test_the_same_source_gives_the_same_bytes_twice(sound: Path, tmp_path: Path) -> None:
    converted(tmp_path, source_of(pixels_of(COUNT), pixels_of(COUNT)[:20]))
    for name in ("train.beton", "train.json", "test.beton", "test.json"):
        assert (tmp_path / name).read_bytes() == (sound / name).read_bytes()


def test_a_conversion_tells_how_far_it_is(tmp_path: Path) -> None:
    steps = [(step.split, step.done, step.total) for step in convert(source_of(pixels_of(40), pixels_of(20)), tmp_path)]
    assert steps == [("train", 16, 40), ("train", 32, 40), ("train", 40, 40), ("test", 16, 20), ("test", 20, 20)]


def test_a_split_that_is_there_is_kept(tmp_path: Path) -> None:
    converted(tmp_path, source_of(pixels_of(5), pixels_of(2)))
    before = (tmp_path / "test.beton").stat()
    (tmp_path / "train.beton").unlink()
    steps = list(convert(source_of(pixels_of(5), pixels_of(2)), tmp_path))
    assert [step.split for step in steps] == ["train"]
    after = (tmp_path / "test.beton").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_channel_that_never_changes_has_a_deviation_that_can_be_divided_by(tmp_path: Path) -> None:
    beton = converted(tmp_path, source_of(np.full((4, 8, 8, 3), 51, np.uint8), pixels_of(1, 8)))
    assert beton.mean == pytest.approx((0.2,) * 3)
    assert all(0 < value < 1e-5 for value in beton.std)


# -- JPEG --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound beton of 50 JPEGs, and one below the limit; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("jpeg")
    converted(folder, source_of(smooth(50), smooth(2)), raw_limit=2 * SIZE * SIZE * 3)
    return folder


def test_a_split_above_the_raw_limit_is_stored_as_jpeg_the_same_bytes_twice(jpeg: Path, tmp_path: Path) -> None:
    assert [open_beton(jpeg / f"{name}.beton").stored for name in ("train", "test")] == ["jpeg", "raw"]
    converted(tmp_path, source_of(smooth(50), smooth(2)), raw_limit=2 * SIZE * SIZE * 3)
    for name in ("train.beton", "train.json"):
        assert (tmp_path / name).read_bytes() == (jpeg / name).read_bytes()
    raw = converted(tmp_path / "raw", source_of(smooth(50), smooth(2)))
    beton = verify_beton(jpeg / "train.beton")
    assert (beton.mean, beton.std, beton.labels.tolist()) == (raw.mean, raw.std, raw.labels.tolist())
    assert beton.digest != raw.digest


@pytest.mark.usefixtures("ffcv")
def test_ffcv_reads_jpegs_within_the_error_of_jpeg(jpeg: Path) -> None:
    from dtrain.data.ffcv_reader import FfcvReader

    reader = FfcvReader(open_beton(jpeg / "train.beton"), iter([np.arange(30), np.arange(30, 50)]), 30)
    images = np.concatenate([flat.reshape(-1, SIZE, SIZE, 3).copy() for flat, _ in reader])
    reader.close()
    assert np.abs(images.astype(int) - smooth(50).astype(int)).mean() < 1.5
    assert np.abs(images.astype(int) - smooth(50).astype(int)).max() < 25


def test_without_ffcv_one_line_says_what_to_do_about_jpegs(jpeg: Path) -> None:
    with pytest.raises(
        UsageError, match=r"stored as JPEG, which FFCV alone reads: pip install 'dtrain\[ffcv\]', leave"
    ):
        open_loader(
            open_beton(jpeg / "train.beton"),
            lambda step: None,
            kind="memory",
            image_size=SIZE,
            channels=3,
            augmentation=None,
            mean=(0.5,),
            std=(0.5,),
            dtype=torch.float32,
            device=torch.device("cpu"),
            largest=1,
        )


JPEG_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a raw image": (lambda path: edit(path, HEAD, b"\1"), "its table of samples is damaged"),
    "another width": (lambda path: edit(path, HEAD + 1, number(33, 2)), "holds an image that is not jpeg 32x32"),
    "a size of nothing": (lambda path: edit(path, end_of(path, 50) + 16, number(0)), "its table of samples is damaged"),
    "a size into the next": (
        lambda path: edit(path, end_of(path, 50) + 16, number(5000)),
        "its table of samples is damaged",
    ),
    "a size beyond the pages": (lambda path: edit(path, end_of(path, 1) + 16, number(3 << 20)), "outside of the file"),
    "a size beyond reason": (lambda path: edit(path, end_of(path, 1) + 16, b"\xff" * 8), "outside of the file"),
    "a flipped byte": (lambda path: edit(path, PAGE + 700, b"\x99\x98"), "its bytes are not those that were written"),
}


def end_of(path: Path, entries: int) -> int:
    """Where the last `entries` entries of the table begin: sample, position, size, 8 bytes each."""
    return path.stat().st_size - entries * ALLOCATION.itemsize


@pytest.mark.parametrize("damage", JPEG_DAMAGES)
def test_a_damaged_beton_of_jpegs_is_refused_with_its_reason(jpeg: Path, tmp_path: Path, damage: str) -> None:
    change, reason = JPEG_DAMAGES[damage]
    for name in ("train.beton", "train.json"):
        shutil.copy(jpeg / name, tmp_path)
    change(tmp_path / "train.beton")
    with pytest.raises(DataError, match=reason):
        open_beton(tmp_path / "train.beton")


# -- facts that shape numbers ------------------------------------------------------------------------------------------


def test_gray_images_are_counted_and_luma_has_its_own_mean_and_deviation(tmp_path: Path) -> None:
    colours = pixels_of(20)
    colours[:5] = colours[:5, :, :, :1]  # R = G = B in these
    beton = converted(tmp_path, source_of(colours, colours[:1]))
    red, green, blue = np.moveaxis(colours.astype(np.int64), 3, 0)
    luma = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16) / 255
    assert beton.gray_images == 5
    assert np.array_equal((luma[:5] * 255).round(), red[:5])
    assert (beton.gray_mean, beton.gray_std) == pytest.approx((luma.mean(), luma.std()))


@pytest.mark.parametrize(
    "change", ['"mean": [0.5, 0.5, 0.5]', '"gray_std": 0.5', '"gray_images": 700', '"class_names": ["a", "b", "c"]']
)
def test_a_sidecar_with_other_facts_is_refused(sound: Path, tmp_path: Path, change: str) -> None:
    shutil.copy(sound / "train.beton", tmp_path)
    facts = json.loads((sound / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(facts | json.loads("{" + change + "}")))
    with pytest.raises(DataError, match=r"train\.json: its facts are not those that were written; remove the folder"):
        open_beton(tmp_path / "train.beton")


def test_the_digest_covers_pixels_labels_and_facts_but_not_where_they_come_from(sound: Path, tmp_path: Path) -> None:
    source = source_of(pixels_of(5), pixels_of(5))
    digests = [
        converted(tmp_path / name, other).digest
        for name, other in {
            "a": source,
            "moved": replace(source, digest="1" * 64),
            "names": replace(source, class_names=("a", "b", "c")),
            "pixels": source_of(pixels_of(6)[1:], pixels_of(5)),
        }.items()
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# -- dtrain data -------------------------------------------------------------------------------------------------------


def test_dtrain_data_converts_inspects_and_verifies(tmp_path: Path) -> None:
    def dtrain(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dtrain", "data", *words], capture_output=True, text=True)

    done = dtrain("convert", "digits", "--cache-dir", tmp_path)
    paths = [Path(line) for line in done.stdout.splitlines() if line.endswith(".beton")]
    assert [path.name for path in paths] == ["train.beton", "test.beton"]
    facts = json.loads(dtrain("inspect", paths[1], "--json").stdout)
    assert (facts["images"], facts["classes"], facts["images_per_class"]) == (360, 10, [36] * 10)
    assert "sound" in dtrain("verify", paths[1]).stdout
    edit(paths[1], PAGE + 5000, b"\x99\x98")
    damaged = dtrain("verify", paths[1])
    assert (damaged.returncode, damaged.stdout) == (DataError.exit_code, "")
    assert damaged.stderr.startswith(f"error: {paths[1]}: its bytes are not those that were written")
    assert len(damaged.stderr.splitlines()) == 1


def test_the_facts_of_a_beton_are_plain_values(sound: Path) -> None:
    facts = data.verify(sound / "test.beton")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["images_per_class"] == [7, 7, 6]  # labels 0, 1, 2 in turn, 20 of them
    assert facts["sound"] is True
    assert {**data.inspect(sound / "test.beton"), "sound": True} == facts


def test_digits_have_the_same_bytes_on_every_machine(tmp_path: Path) -> None:
    betons = finished(data.convert(Data(dataset="digits", data_dir=tmp_path, cache_dir=tmp_path)))
    assert {name: beton.sha256[:16] for name, beton in betons.items()} == {
        "train": "365e2df75cbce666",
        "test": "f035ff131156add5",
    }


def test_a_file_that_is_no_picture_does_not_make_another_data_set(tmp_path: Path) -> None:
    without = converted(tmp_path / "a", source_of(smooth(50), smooth(2)))
    beside = replace(source_of(smooth(50), smooth(2)), passed_by=("train/cat/Thumbs.db",))
    assert converted(tmp_path / "b", beside).digest == without.digest
