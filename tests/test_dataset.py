"""Claims about what of the betons a network sees: how many channels, how large, normalised by what."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import betons
import numpy as np
import pytest
from betons import Pixels, feed_of, pixels_of
from pets import FILES, contents, png, write_folder, write_tar
from PIL import Image, ImageOps
from warm import Warm

from dtrain.data.dataset import DataSet
from dtrain.settings.config import TrainConfig

TAKES = "allcnn_c"
SMALL = f"{Path(__file__).with_name('small_network.py')}:small"


@pytest.fixture
def colours_only(tmp_path: Path) -> str:
    """An architecture that does not take in_channels."""
    path = tmp_path / "net.py"
    path.write_text("def net(num_classes):\n    raise RuntimeError\n")
    return f"{path}:net"


def pets(folder: Path, *, gray_train: int = 4, gray_test: int = 2) -> Path:
    """Four training and two test images of 4 x 4, of which as many as told are gray."""
    files = {}
    for number, (name, seed) in enumerate(FILES.items()):
        gray = number < gray_train if name.startswith("train") else number - 4 < gray_test
        pixels = pixels_of(6, 4)[seed - 1]
        files[name] = png(pixels[..., 0] if gray else pixels)
    return write_folder(folder, files)


def loaded(dataset: Any, cache: Path, **settings: Any) -> DataSet:
    return betons.loaded(
        TrainConfig.of(recipe="none", **{"arch": TAKES, **settings}, dataset=str(dataset), cache_dir=cache)
    )


def first_chunk(data: DataSet, **settings: Any) -> Pixels:
    config = TrainConfig.of(recipe="none", arch=TAKES, loader="memory", **settings)
    chunks = data.chunks(0, 1, feed_of(config), chunk_size=500)
    with chunks.loader:
        batch = chunks.batch(0)
    assert batch is not None
    images: Pixels = batch.images.numpy()
    return images


def test_every_start_says_what_was_left_out_at_the_conversion(tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets")
    (folder / "train/cat/9.png").write_bytes(b"no picture")
    told = "left out of train, since they cannot be decoded: 1; `dtrain data inspect` lists them"
    for _ in range(2):
        assert loaded(folder, tmp_path / "cache", bad_images="skip").left_out == [told]
    (folder / "train/cat/9.png").unlink()
    assert loaded(folder, tmp_path / "cache", bad_images="skip").left_out == []


# -- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gray_train", "gray_test", "channels"), [(4, 2, 1), (4, 0, 1), (3, 2, 3), (0, 2, 3)])
def test_auto_is_one_channel_if_every_training_image_is_gray(
    tmp_path: Path, gray_train: int, gray_test: int, channels: int
) -> None:
    folder = pets(tmp_path / "pets", gray_train=gray_train, gray_test=gray_test)
    assert loaded(folder, tmp_path / "cache").channels == channels


def test_auto_is_three_channels_if_the_architecture_takes_no_other_number(tmp_path: Path, colours_only: str) -> None:
    assert loaded("digits", tmp_path).channels == 1
    assert loaded("digits", tmp_path, arch=colours_only).channels == 3


def test_a_number_of_channels_that_is_asked_for_is_given(tmp_path: Path, colours_only: str) -> None:
    assert loaded("digits", tmp_path, channels="3").channels == 3
    assert loaded(pets(tmp_path / "pets", gray_train=0), tmp_path, channels="1").channels == 1
    assert loaded("digits", tmp_path, arch=colours_only, channels="1").channels == 1


def test_one_channel_is_the_gray_value_normalised_by_its_own_mean_and_deviation(tmp_path: Path) -> None:
    data = loaded("digits", tmp_path)
    images = first_chunk(data)
    flat = np.fromfile(data.evaluation.path, np.uint8)
    pixels = np.stack([flat[int(at) : int(at) + 32 * 32 * 3 : 3] for at in data.evaluation.pixel_offsets])
    train = np.fromfile(data.train.path, np.uint8)
    values = np.stack([train[int(at) : int(at) + 32 * 32 * 3 : 3] for at in data.train.pixel_offsets]) / 255
    assert images.shape == (360, 1, 32, 32)
    wanted = (pixels.reshape(360, 1, 32, 32) / 255 - values.mean()) / values.std()
    np.testing.assert_allclose(images, wanted, rtol=1e-4, atol=1e-5)


def test_colours_seen_through_one_channel_are_their_luma(tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets", gray_train=0, gray_test=0)
    images = first_chunk(loaded(folder, tmp_path / "cache", channels="1"), mean=(0.0,), std=(1.0,))
    red, green, blue = np.moveaxis(pixels_of(6, 4)[4:].astype(float), 3, 0)
    # ITU-R BT.601, rounded to whole levels
    assert np.abs(images[:, 0] * 255 - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 0.51


def test_a_run_on_gray_images_trains_saves_and_evaluates_one_channel(ranks: Warm, tmp_path: Path) -> None:
    places = ["--cache-dir", tmp_path / "cache", "--output", tmp_path / "run", "--threads", "1", "--loader", "memory"]
    flags = ["--arch", SMALL, "--dataset", "digits", "--recipe", "none", "--steps", "3", "--batch-size", "100"]
    (result,) = ranks([*flags, *places], world=1)
    assert result.code == 0, result.err
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step-*3/manifest.json")).read_text())
    assert '"channels": 1' in json.dumps(state)
    (evaluated,) = ranks(["eval", tmp_path / "run", "--loader", "memory"], world=1)
    assert evaluated.code == 0, evaluated.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert f"{last['hits']}/360" in evaluated.out


# -- size ------------------------------------------------------------------------------------------------------------


def test_the_network_sees_what_is_asked_for_and_the_beton_holds_what_it_is_cut_from(tmp_path: Path) -> None:
    for settings, seen, held in (
        ({}, 32, 32),
        ({"image_size": 20}, 20, 20),
        ({"image_size": 20, "store_size": 24}, 20, 24),
        ({"image_size": 32, "store_size": 40}, 32, 40),
    ):
        data = loaded("digits", tmp_path, **settings)
        assert (data.image_size, data.train.image_size, data.evaluation.image_size) == (seen, held, held)
        assert first_chunk(data).shape[2:] == (seen, seen)


def test_photographs_of_many_sizes_become_squares(shared_data: Path, tmp_path: Path) -> None:
    data = loaded(shared_data / "hymenoptera-400.tar", tmp_path, image_size=64, store_size=72)
    assert (data.train.class_names, data.train.image_size, data.channels) == (("ants", "bees"), 72, 3)
    # as DATA.md counts them
    assert [np.bincount(beton.labels).tolist() for beton in (data.train, data.evaluation)] == [[123, 121], [70, 83]]
    with tarfile.open(shared_data / "hymenoptera-400.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.startswith("train/"))
        file = tar.extractfile(names[200])
        assert file is not None
        wanted = np.asarray(ImageOps.fit(Image.open(file), (72, 72), Image.Resampling.BICUBIC))
    flat = np.fromfile(data.train.path, np.uint8)
    pixels = flat[int(data.train.pixel_offsets[200]) :][: 72 * 72 * 3].reshape(72, 72, 3)
    assert np.abs(pixels.astype(int) - wanted).mean() < 1


# -- one process a host ------------------------------------------------------------------------------------------------


def cold_start(source: Path, cache: Path, output: Path, *, own_host: bool = False) -> tuple[int, set[str], set[str]]:
    """Train for a step; returns the rank, the files and folders of the source that it looked into, and what it wrote
    into the cache. own_host: as if each process had a host and a cache of its own."""
    from dtrain import train

    rank, looked, written = int(os.environ["RANK"]), set(), set()
    if own_host:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        cache /= str(rank)

    def seen(event: str, details: tuple[Any, ...]) -> None:
        if event in ("open", "os.scandir", "os.listdir") and isinstance(details[0], str):
            path = Path(details[0])
            if path.is_relative_to(source):
                looked.add(path.relative_to(source).as_posix())
            elif path.is_relative_to(cache) and event == "open" and str(details[1])[:1] in "wa":
                written.add(path.name)

    sys.addaudithook(seen)
    settings: dict[str, Any] = {"arch": SMALL, "dataset": str(source), "recipe": "none", "threads": 1, "steps": 1}
    train(TrainConfig.of(**settings, batch_size=4, loader="memory", cache_dir=cache, output=output))
    return rank, looked, written


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_on_a_cold_start_one_process_of_a_host_reads_the_source_and_the_others_its_betons(
    ranks: Warm, tmp_path: Path, kind: str
) -> None:
    files = contents()
    source = write_folder(tmp_path / "pets", files) if kind == "folder" else write_tar(tmp_path / "pets.tar", files)
    given = {"source": source, "cache": tmp_path / "cache", "output": tmp_path / "run"}
    first, second = ranks.call("test_dataset:cold_start", 2, given)
    assert first[1] >= (set(files) if kind == "folder" else {"."})
    assert "train.verified" in first[2]
    assert second == (1, set(), set())


@pytest.mark.dist
def test_hosts_with_a_cache_each_read_the_source_each(ranks: Warm, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pets", contents())
    given = {"source": source, "cache": tmp_path / "cache", "output": tmp_path / "run", "own_host": True}
    first, second = ranks.call("test_dataset:cold_start", 2, given)
    assert first[1] == second[1] >= set(FILES)
    assert "train.verified" in first[2] & second[2]


# -- what a resume must find again -----------------------------------------------------------------------------------


def test_the_digest_of_a_data_set_changes_with_a_pixel_a_label_or_a_class_name(tmp_path: Path) -> None:
    renamed = {name.replace("cat", "cats"): data for name, data in contents().items()}
    swapped = {name.replace("dog/2", "cat/3"): data for name, data in contents().items()}
    other = contents() | {"test/cat/1.png": contents()["test/dog/1.png"]}
    digests = {
        name: loaded(write_folder(tmp_path / name / "pets", files), tmp_path / name / "cache").digest
        for name, files in {"a": contents(), "b": contents(), "r": renamed, "s": swapped, "o": other}.items()
    }
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 4
