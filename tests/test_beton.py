"""Claims about betons: FFCV's bytes, the same twice; whole or not at all; converted once; no damage is let through."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from needs import need_ffcv

from dtrain.commands import data
from dtrain.config import Conversion
from dtrain.data.beton import Beton, open_beton, verify_beton
from dtrain.data.cache import convert, prepare
from dtrain.data.format import ALLOCATION, FIELD, HEADER, PAGE, SAMPLE, VERSION
from dtrain.data.loader import open_loader
from dtrain.data.named import arrays
from dtrain.data.pictures import BadPicture, Source, Split
from dtrain.errors import DataError, ProcessError, StorageError, UsageError
from dtrain.files import Lock

Pixels = npt.NDArray[np.uint8]

CLASSES = ("cat", "cow", "dog")
COUNT, SIZE = 700, 32  # 682 images of 3,072 bytes fill a page of 2 MiB, so there are two pages
HEAD = HEADER.itemsize + 2 * FIELD.itemsize  # where the samples' records begin


def pixels_of(count: int, size: int = SIZE) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def source_of(train: Pixels, test: Pixels, *, stream: Callable[[Pixels], Iterator[Pixels]] = iter) -> Source:
    splits = {
        name: Split(np.arange(len(pixels), dtype=np.int64) * 7 % 3, lambda pixels=pixels: arrays(stream(pixels)))
        for name, pixels in (("train", train), ("test", test))
    }
    return Source("pets", CLASSES, train.shape[1], "0" * 64, splits)


def converted(folder: Path, source: Source, **how: Any) -> Beton:
    folder.mkdir(exist_ok=True)
    list(convert(source, folder, **how))
    return open_beton(folder / "train.beton")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound beton; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("sound")
    converted(folder, source_of(pixels_of(COUNT), pixels_of(COUNT)[:20]))
    return folder


def pixels_in(beton: Beton) -> Pixels:
    flat = np.fromfile(beton.path, np.uint8)
    size = beton.image_size
    rows = [flat[int(at) : int(at) + size * size * 3].reshape(size, size, 3) for at in beton.pixel_offsets]
    return np.stack(rows)


# -- against FFCV ----------------------------------------------------------------------------------------------------


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


# -- what is written -------------------------------------------------------------------------------------------------


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


# -- JPEG ------------------------------------------------------------------------------------------------------------


def smooth(count: int, size: int = SIZE) -> Pixels:
    """Pictures that JPEG likes: a slope each, of its own directions."""
    y, x = np.mgrid[0:size, 0:size] / size
    slopes = np.arange(count * 6).reshape(count, 1, 1, 3, 2) * 37 % 200
    return (slopes[..., 0] * x[..., None] + slopes[..., 1] * y[..., None] / 4).astype(np.uint8)


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


# -- facts that shape numbers ----------------------------------------------------------------------------------------


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


# -- pictures that cannot be decoded ---------------------------------------------------------------------------------


def with_bad(*bad: int) -> Source:
    """Seven pictures of 4 x 4 of labels 0 1 2 0 1 2 0, of which those at `bad` cannot be decoded."""

    def stream() -> Iterator[Callable[[], Pixels]]:
        for index, decode in enumerate(arrays(pixels_of(7, 4))):
            yield partial(fail, index) if index in bad else decode

    def fail(index: int) -> Pixels:
        raise BadPicture("pets.tar", f"train/{index}.png", "image file is truncated")

    good = source_of(pixels_of(7, 4), pixels_of(7, 4))
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    return replace(good, splits={"train": Split(labels, stream), "test": good.splits["test"]}, passed_by=("a/b.txt",))


def test_a_bad_picture_stops_a_conversion_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pets\.tar: train/3\.png cannot be decoded \(image file is truncated\)"):
        list(convert(with_bad(3, 5), tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_picture_can_be_left_out_counted_listed_and_told(tmp_path: Path) -> None:
    steps = list(convert(with_bad(3, 5), tmp_path, "skip"))
    beton = open_beton(tmp_path / "train.beton")
    assert beton.labels.tolist() == [0, 1, 2, 1, 0]
    assert np.array_equal(pixels_in(beton), pixels_of(7, 4)[[0, 1, 2, 4, 6]])
    assert data.inspect(beton.path)["skipped"] == [
        "train/3.png (image file is truncated)",
        "train/5.png (image file is truncated)",
    ]
    assert data.inspect(beton.path)["passed_by"] == ["a/b.txt"]
    assert [line for step in steps for line in step.told] == [
        "pets/train: 2 pictures that cannot be decoded are left out: train/3.png (image file is truncated), "
        "train/5.png (image file is truncated)",
        "pets: 1 files that are no pictures are passed by: a/b.txt",
    ]


def test_a_class_whose_pictures_are_all_bad_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pets/train: no picture of class 'dog' can be decoded; replace or remove it"):
        list(convert(with_bad(2, 5), tmp_path, "skip"))
    assert list(tmp_path.iterdir()) == []


def test_pictures_keep_their_order_whoever_decodes_them_first(tmp_path: Path) -> None:
    pixels = pixels_of(100, 4)

    def slow(index: int) -> Pixels:
        time.sleep(0.02 if index % 16 == 0 else 0)  # each block takes its time, the first ones longer
        return pixels[index]

    split = Split(np.zeros(100, np.int64), lambda: (partial(slow, index) for index in range(100)))
    converted(tmp_path, Source("pets", CLASSES, 4, "", {"train": split, "test": split}))
    assert np.array_equal(pixels_in(open_beton(tmp_path / "train.beton")), pixels)


# -- whole or not at all ---------------------------------------------------------------------------------------------


def broken_after(count: int, end: BaseException | None) -> Callable[[Pixels], Iterator[Pixels]]:
    def stream(pixels: Pixels) -> Iterator[Pixels]:
        yield from pixels[:count]
        if end is not None:
            raise end

    return stream


@pytest.mark.parametrize("count", [0, 1, 682, 699])
def test_an_error_in_the_middle_of_a_source_leaves_no_beton(tmp_path: Path, count: int) -> None:
    for end, told in ((DataError("a bad image"), "a bad image"), (None, f"700 images were listed, {count} came")):
        source = source_of(pixels_of(COUNT), pixels_of(5), stream=broken_after(count, end))
        with pytest.raises(DataError, match=told):
            list(convert(source, tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_an_image_of_another_size_or_one_too_many_leaves_no_beton(tmp_path: Path) -> None:
    for come, told in (
        ([*pixels_of(4), pixels_of(1, 16)[0]], r"an image of shape \(16, 16, 3\) came where 32x32 RGB was promised"),
        (pixels_of(6), "5 images were listed, 6 came"),
    ):
        source = source_of(pixels_of(5), pixels_of(5), stream=lambda pixels, come=come: iter(come))
        with pytest.raises(DataError, match=told):
            list(convert(source, tmp_path))
        assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_is_given_up_leaves_neither_a_beton_nor_a_thread(tmp_path: Path) -> None:
    for _ in range(3):
        steps = convert(source_of(pixels_of(COUNT), pixels_of(COUNT)), tmp_path)
        next(steps)
        steps.close()  # type: ignore[attr-defined]  # a generator
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told_and_leaves_no_beton(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root may mount a small disk")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no mount is allowed here")
    try:
        with pytest.raises(StorageError, match=r"train\.beton: the disk is full; free space or name another folder"):
            list(convert(source_of(pixels_of(COUNT), pixels_of(5)), small))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_file_that_may_not_grow_is_told_and_leaves_no_beton(tmp_path: Path) -> None:
    code = """if True:
        import resource, sys
        from pathlib import Path
        from dtrain.data.cache import prepare
        from dtrain.errors import StorageError
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
        try:
            list(prepare("synthetic", Path(sys.argv[1]), Path(sys.argv[1])))
        except StorageError as error:
            print(error)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train.beton: File too large; free space or name another folder with --cache-dir" in done.stdout
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


def test_ctrl_c_leaves_neither_a_beton_nor_a_process_and_the_next_conversion_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtrain", "data", "convert", "synthetic", "--cache-dir"]
    part, attempt = None, 0
    while part is None and attempt < 5:  # a busy machine may look too late
        attempt += 1
        cache = tmp_path / str(attempt)
        with subprocess.Popen(
            [*command, cache], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as child:
            while part is None and child.poll() is None:  # into the middle of the training set's file
                part = next(cache.rglob(".partial-train.beton*"), None)
                time.sleep(0.005)
            if part is not None:
                os.killpg(child.pid, signal.SIGINT)
            _, told = child.communicate(timeout=20)
    assert (part is not None, child.returncode) == (True, 130), told
    with pytest.raises(ProcessLookupError):  # its whole group is gone
        os.killpg(child.pid, 0)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["lock"]
    assert len(finished(prepare("synthetic", tmp_path, cache))["train"].labels) == 2000


def finished(steps: Any) -> dict[str, Beton]:
    """Run a conversion to its end and return its betons."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            betons: dict[str, Beton] = end.value
            return betons


# -- the cache -------------------------------------------------------------------------------------------------------

PREPARE = """if True:
    import json, sys
    from pathlib import Path
    from dtrain.data.cache import prepare
    print("ready", flush=True)
    sys.stdin.readline()
    steps, yielded = prepare("digits", Path(sys.argv[1]), Path(sys.argv[1])), 0
    while True:
        try:
            next(steps)
            yielded += 1
        except StopIteration as end:
            print(json.dumps([yielded > 0, {name: beton.sha256 for name, beton in end.value.items()}]))
            break"""


@contextlib.contextmanager
def preparers(count: int, cache: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have imported everything and prepare digits as soon as they are sent a line."""
    command = [sys.executable, "-c", PREPARE, str(cache)]
    with contextlib.ExitStack() as opened:
        children = []
        for _ in range(count):
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            children.append(opened.enter_context(child))
            opened.callback(child.kill)
        for child in children:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
        yield children


def test_of_processes_that_prepare_one_set_at_once_one_converts_and_all_get_equal_betons(tmp_path: Path) -> None:
    with preparers(3, tmp_path) as children:
        for child in children:
            assert child.stdin
            child.stdin.write("go\n")
            child.stdin.flush()
        told = [json.loads(child.communicate(timeout=30)[0]) for child in children]
    assert sorted(has_converted for has_converted, _ in told) == [False, False, True]
    betons = [sha for _, sha in told]
    assert betons[0] == betons[1] == betons[2]
    assert len(betons[0]) == 2


def test_a_process_waits_for_the_lock_and_converts_if_its_holder_did_not(tmp_path: Path) -> None:
    finished(prepare("digits", tmp_path, tmp_path))
    (folder,) = tmp_path.glob("digits-*")
    for path in folder.glob("*.*"):
        path.unlink()
    lock = Lock(folder / "lock")
    assert lock.acquire()
    with preparers(1, tmp_path) as (child,):
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.7)
        assert [path.name for path in folder.iterdir()] == ["lock"]
        lock.release()
        assert json.loads(child.communicate(timeout=30)[0])[0] is True


def test_a_process_that_waits_too_long_names_the_one_that_converts(tmp_path: Path) -> None:
    finished(prepare("digits", tmp_path, tmp_path))
    (folder,) = tmp_path.glob("digits-*")
    (folder / "train.beton").unlink()
    lock = Lock(folder / "lock")
    assert lock.acquire()
    with pytest.raises(ProcessError, match=rf"is being converted by .* process {os.getpid()} for over 0\.1 s"):
        finished(prepare("digits", tmp_path, tmp_path, timeout_seconds=0.1))
    lock.release()


def test_a_prepared_set_is_not_converted_again_and_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    first = finished(prepare("digits", tmp_path, tmp_path))
    assert list(prepare("digits", tmp_path, tmp_path)) == []
    leftover = first["train"].path.with_name(".partial-train.beton-12345")
    leftover.write_bytes(b"half")
    first["train"].path.unlink()
    again = finished(prepare("digits", tmp_path, tmp_path))
    assert again["train"].sha256 == first["train"].sha256
    assert not leftover.exists()


def test_two_settings_of_a_conversion_are_two_folders_and_what_is_cut_later_is_none(tmp_path: Path) -> None:
    ways = [{}, {"resize": "squash"}, {"bad_images": "skip"}, {"image_size": 16}, {"image_size": 20}]
    ways += [{"image_size": 16, "store_size": 20}, {"image_size": 18, "store_size": 20}]  # cut out of those of 20
    betons = [finished(prepare("digits", tmp_path, tmp_path, Conversion(**way)))["test"] for way in ways]  # type: ignore[arg-type]
    assert [beton.image_size for beton in betons] == [32, 32, 32, 16, 20, 20, 20]
    assert len({beton.path.parent for beton in betons}) == 5


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"the cache .*file/below: Not a directory; name a writable one with --cache"
    ):
        list(prepare("digits", tmp_path, tmp_path / "file" / "below"))


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "pets" / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "1.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"pets/train/cat/1\.png"):
        list(prepare(str(tmp_path / "pets"), tmp_path, tmp_path / "cache"))


# -- damage ----------------------------------------------------------------------------------------------------------


def edit(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def resize(size: Callable[[int], int]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        os.truncate(path, size(path.stat().st_size))

    return change


def at(place: int, data: bytes) -> Callable[[Path], None]:
    return lambda path: edit(path, place, data)


def moved(sample: int, position: int) -> Callable[[Path], None]:
    """Another position of a sample's pixels, in its record and in the table: only the file's bounds can tell."""

    def change(path: Path) -> None:
        edit(path, HEAD + sample * SAMPLE.itemsize + 5, number(position))
        edit(path, path.stat().st_size - (COUNT - sample) * ALLOCATION.itemsize + 8, number(position))

    return change


def table_at(place: int) -> Callable[[Path], None]:
    """A table that lies where the records are, in a file that has just its length."""

    def change(path: Path) -> None:
        os.truncate(path, place + COUNT * ALLOCATION.itemsize)
        edit(path, 16, number(place))

    return change


# by hand from FFCV's types: 24 bytes of header (version 0, fields 2, page 4, samples 8, table 16); a descriptor is a
# type, a name of 16 and 1,024 bytes of arguments; a record of 24 is mode 0, width 1, height 3, position 5, label 16
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "No such file"),
    "empty": (resize(lambda size: 0), "too short to be a beton"),
    "a header alone": (resize(lambda size: 24), "too short to be a beton"),
    "text": (lambda path: path.write_text("this is no beton\n" * 999) and None, "not a beton of this version"),
    "another version": (at(0, number(1, 2)), "not a beton of this version"),
    "three fields": (at(2, number(3, 2)), "not a beton of this version"),
    "an unknown type of field": (at(24, b"\x63"), "its fields are not one image and one label"),
    "another name of a field": (at(25, b"x"), "its fields are not one image and one label"),
    "cut in the records": (resize(lambda size: 3000), "unfinished or cut short"),
    "cut in half": (resize(lambda size: size // 2), "unfinished or cut short"),
    "table cut off": (resize(lambda size: size - COUNT * 24), "unfinished or cut short"),
    "half a table": (resize(lambda size: size - COUNT * 12), "unfinished or cut short"),
    "an odd tail": (resize(lambda size: size + 1), "unfinished or cut short"),
    "one entry more": (resize(lambda size: size + 24), "unfinished or cut short"),
    "never finished": (at(16, number(0)), "unfinished or cut short"),
    "table in the records": (table_at(HEAD + 100), "unfinished or cut short"),
    "table beyond the end": (at(16, number(2**63)), "unfinished or cut short"),
    "a sample less": (at(8, number(COUNT - 1)), "unfinished or cut short"),
    "no samples": (at(8, number(0)), "unfinished or cut short"),
    "samples beyond reason": (at(8, number(2**64 - 1)), "unfinished or cut short"),
    "a JPEG": (at(HEAD, b"\0"), "holds an image that is not raw 32x32"),
    "another kind of image": (at(HEAD, number(2, 1)), "holds an image that is neither raw nor JPEG"),
    "another width": (at(HEAD + 1, number(33, 2)), "its table of samples is damaged"),
    "another height": (at(HEAD + 24 * 699 + 3, number(0, 2)), "its table of samples is damaged"),
    "another shape": (at(HEAD + 1, number(64, 2) + number(16, 2)), "holds an image that is not raw 32x32"),
    "a label too large": (at(HEAD + 16, number(3)), "holds a label outside 0..2"),
    "a negative label": (at(HEAD + 24 * 699 + 16, b"\xff" * 8), "holds a label outside 0..2"),
    "a position that the table has not": (at(HEAD + 5, number(2 * PAGE)), "its table of samples is damaged"),
    "pixels in the records": (moved(0, HEAD), "pixels lie outside of the file"),
    "pixels in the table": (moved(699, 3 * PAGE - 3071), "pixels lie outside of the file"),
    "pixels beyond the end": (moved(5, 2**40), "pixels lie outside of the file"),
    "pixels beyond reason": (moved(5, 2**64 - 1), "pixels lie outside of the file"),
    "a flipped pixel": (at(PAGE + 5000, b"\x99\x98"), "its bytes are not those that were written"),
    "another good label": (at(HEAD + 16, number(1)), "its bytes are not those that were written"),
    "another page size": (at(4, number(1 << 22, 4)), "its bytes are not those that were written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_beton_is_refused_with_its_reason(sound: Path, tmp_path: Path, damage: str) -> None:
    change, reason = DAMAGES[damage]
    for name in ("train.beton", "train.json"):
        shutil.copy(sound / name, tmp_path)
    path = tmp_path / "train.beton"
    open_beton(path)
    change(path)
    for refused in (open_beton, verify_beton, data.inspect, data.verify):
        with pytest.raises(DataError) as told:
            refused(path)
        assert str(told.value).startswith(f"{path}: ")
        assert reason in str(told.value)
        assert "convert" in str(told.value)


@pytest.mark.parametrize("flip", range(10))
def test_any_flipped_bit_of_head_records_or_table_is_refused(sound: Path, tmp_path: Path, flip: int) -> None:
    for name in ("train.beton", "train.json"):
        shutil.copy(sound / name, tmp_path)
    path = tmp_path / "train.beton"
    rng, size = np.random.default_rng(flip), path.stat().st_size
    place = int(rng.choice([rng.integers(0, HEAD + COUNT * 24), rng.integers(size - COUNT * 24, size)]))
    byte = path.read_bytes()[place]
    edit(path, place, bytes([byte ^ 1 << int(rng.integers(8))]))
    with pytest.raises(DataError, match=r"train\.beton: "):
        open_beton(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "5", "[]", "{}", '{"split": "train"}']
    + [f"CHANGE {change}" for change in ('"class_names": 5', '"mean": 0.5', '"digest": null', '"format": 1')],
)
def test_a_damaged_sidecar_is_refused(sound: Path, tmp_path: Path, text: str) -> None:
    shutil.copy(sound / "train.beton", tmp_path)
    if text.startswith("CHANGE "):
        facts = json.loads((sound / "train.json").read_text())
        text = json.dumps(facts | json.loads("{" + text.removeprefix("CHANGE ") + "}"))
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=r"train\.(json|beton): .*convert"):
        open_beton(tmp_path / "train.beton")


def test_a_beton_without_its_sidecar_is_refused(sound: Path, tmp_path: Path) -> None:
    shutil.copy(sound / "train.beton", tmp_path)
    with pytest.raises(DataError, match=r"train\.json: .*No such file"):
        open_beton(tmp_path / "train.beton")


def test_a_flip_that_keeps_size_and_time_is_found_by_verify(sound: Path, tmp_path: Path) -> None:
    for name in ("train.beton", "train.json"):
        shutil.copy(sound / name, tmp_path)
    path = tmp_path / "train.beton"
    open_beton(path)
    stat = path.stat()
    edit(path, PAGE + 5000, b"\x99\x98")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    open_beton(path)
    with pytest.raises(DataError, match="its bytes are not those that were written"):
        verify_beton(path)


# -- dtrain data -----------------------------------------------------------------------------------------------------


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
    betons = finished(data.convert("digits", tmp_path, tmp_path))
    assert {name: beton.sha256[:16] for name, beton in betons.items()} == {
        "train": "365e2df75cbce666",
        "test": "f035ff131156add5",
    }


def test_a_file_that_is_no_picture_does_not_make_another_data_set(tmp_path: Path) -> None:
    without = converted(tmp_path / "a", source_of(smooth(50), smooth(2)))
    beside = replace(source_of(smooth(50), smooth(2)), passed_by=("train/cat/Thumbs.db",))
    assert converted(tmp_path / "b", beside).digest == without.digest
