"""Claims about pairs of betons as sources: those of dtrain and those of FFCV's own writer."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from betons import CLASSES, Pixels, converted, finished, pixels_in, pixels_of, smooth, source_of
from needs import need_ffcv

from dtrain.data.cache import prepare
from dtrain.data.sources import digest_of, find_source, locate
from dtrain.errors import DataError
from dtrain.settings.data import Conversion


def images_of(folder: Path, split: str, **asked: Any) -> list[Pixels]:
    return [decode() for decode in find_source(str(folder), folder, Conversion(**asked)).splits[split].pictures()]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A pair that dtrain wrote: raw, 20 and 5 images of 16 x 16."""
    converted(tmp_path / "pets", source_of(pixels_of(20, 16), pixels_of(5, 16)))
    return tmp_path / "pets"


def test_a_pair_of_dtrains_is_a_data_set_with_its_pixels_labels_and_class_names(pair: Path, tmp_path: Path) -> None:
    betons = finished(prepare(str(pair), tmp_path, tmp_path / "cache"))
    assert betons["train"].class_names == CLASSES
    assert betons["train"].image_size == 16
    for name, count in (("train", 20), ("test", 5)):
        assert np.array_equal(pixels_in(betons[name]), pixels_of(count, 16))
        assert betons[name].labels.tolist() == (np.arange(count) * 7 % 3).tolist()


def test_val_stands_for_test_where_there_is_none_and_another_size_may_be_asked_for(pair: Path) -> None:
    for ending in (".beton", ".json"):
        (pair / f"test{ending}").rename(pair / f"val{ending}")
    assert len(images_of(pair, "test")) == 5
    assert images_of(pair, "train", image_size=8)[0].shape == (8, 8, 3)


def test_a_pair_of_jpegs_is_read_within_the_error_of_jpeg(tmp_path: Path) -> None:
    converted(tmp_path, source_of(smooth(20), smooth(5)), raw_limit=0)
    images = np.stack(images_of(tmp_path, "train"))
    assert np.abs(images.astype(int) - smooth(20).astype(int)).mean() < 1.5


def test_the_digest_of_a_pair_depends_on_its_own_files_alone(pair: Path) -> None:
    def digest() -> str:
        return digest_of(locate(str(pair), pair))

    before = digest()
    (pair / "lock").write_text("x")
    assert digest() == before
    os.utime(pair / "test.beton", ns=(1, 1))
    assert digest() != before


def by_ffcv(path: Path, samples: list[tuple[Any, ...]], order: tuple[str, str], workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": ("picture", RGBImageField(write_mode="proportion", jpeg_quality=95)), "label": ("y", IntField())}
    class_of = {"image": 0, "label": 1}
    rows = [tuple(sample[class_of[name]] for name in order) for sample in samples]
    with Path(os.devnull).open("w") as null, contextlib.redirect_stderr(null):  # its bar
        writer = DatasetWriter(str(path), dict(fields[name] for name in order), num_workers=workers)
        writer.from_indexed_dataset(rows, chunksize=3)


@pytest.mark.parametrize("order", [("image", "label"), ("label", "image")])
def test_what_ffcvs_own_writer_wrote_is_read_whatever_its_names_order_sizes_and_modes(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    need_ffcv()
    import dtrain.data.ffcv_reader  # noqa: F401 - the one door, which keeps the import cheap and without traces

    samples = [(smooth(12, size)[index], index % 3) for index, size in enumerate([30, 41, 40] * 4)]
    for name in ("train", "val"):
        by_ffcv(tmp_path / f"{name}.beton", samples, order, workers=1 if name == "val" else 2)
    source = find_source(str(tmp_path), tmp_path)
    assert (source.class_names, source.image_size) == (("0", "1", "2"), 224)
    assert source.splits["train"].labels.tolist() == [0, 1, 2] * 4
    images = images_of(tmp_path, "train", image_size=40, resize="squash")
    for index in (2, 5, 8, 11):  # those of 40 x 40: as they were, or within the error of JPEG
        assert np.abs(images[index].astype(int) - samples[index][0].astype(int)).mean() < 1.5
    from tqdm import tqdm

    if tqdm.monitor is not None:  # the thread behind the bar of FFCV's writer
        tqdm.monitor.exit()
        tqdm.monitor = None


def relabel(pair: Path, split: str, labels: list[int]) -> None:
    """Labels in the place of the first ones: 16 bytes into each record of 24, which begin after 24 + 2 x 1041 bytes."""
    with (pair / f"{split}.beton").open("r+b") as file:
        for index, label in enumerate(labels):
            file.seek(24 + 2 * 1041 + 24 * index + 16)
            file.write(label.to_bytes(8, "little", signed=True))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda pair: relabel(pair, "test", [7]), "test.beton: label 7 is not in train.beton"),
        (lambda pair: relabel(pair, "train", [3]), "train.beton: holds the labels 0..3 but 3 class names"),
        (lambda pair: relabel(pair, "train", [-1]), "train.beton: holds the labels -1..2 but 3 class names"),
        (lambda pair: (pair / "train.json").write_text("{}"), "train.json: no class names can be read"),
        (lambda pair: (pair / "test.beton").write_bytes(b"no beton" * 999), "test.beton: not a beton of this version"),
        (lambda pair: os.truncate(pair / "train.beton", 3 << 20), "train.beton: unfinished or cut short"),
        (lambda pair: os.truncate(pair / "train.beton", 0), "train.beton: too short to be a beton"),
    ],
)
def test_a_pair_that_cannot_be_a_data_set_is_refused_with_its_reason(pair: Path, damage: Any, told: str) -> None:
    damage(pair)
    with pytest.raises(DataError) as refused:
        find_source(str(pair), pair)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_a_sidecar_classes_are_numbers(pair: Path) -> None:
    (pair / "train.json").unlink()
    assert find_source(str(pair), pair).class_names == ("0", "1", "2")
    relabel(pair, "train", [0] * 20)
    relabel(pair, "test", [0] * 5)
    with pytest.raises(DataError, match="holds a single class; give a pair with two or more"):
        find_source(str(pair), pair)


def test_a_sidecar_that_is_not_ours_is_told(pair: Path) -> None:
    (pair / "train.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"train\.json: no class names can be read .*; repair or remove it"):
        find_source(str(pair), pair)
