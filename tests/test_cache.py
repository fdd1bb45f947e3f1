"""Claims about conversions: whole or not at all, in order, once for all who ask; what is left out is told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from betons import CLASSES, COUNT, Pixels, converted, finished, pixels_in, pixels_of, source_of

from dtrain.commands import data
from dtrain.data.beton import open_beton
from dtrain.data.cache import convert, prepare
from dtrain.data.layouts import arrays
from dtrain.data.pictures import BadPicture, Source, Split
from dtrain.errors import DataError, ProcessError, StorageError
from dtrain.files import Lock
from dtrain.settings.data import Conversion

# -- pictures that cannot be decoded -----------------------------------------------------------------------------------


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
        "pets: 1 files that are not pictures are ignored: a/b.txt",
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


# -- whole or not at all -----------------------------------------------------------------------------------------------


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


# -- the cache ---------------------------------------------------------------------------------------------------------

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
    with pytest.raises(ProcessError, match=rf"process {os.getpid()} has been converting .* for over 0\.1 s"):
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


def test_betons_that_another_process_has_found_are_opened_as_they_are_and_missing_ones_are_made(tmp_path: Path) -> None:
    first = finished(prepare("digits", tmp_path, tmp_path))
    folder = first["train"].path.parent
    (folder / "train.verified").unlink()
    found = finished(prepare("no such set", tmp_path, tmp_path, found=folder))  # the source is not looked at
    assert [found[name].sha256 for name in found] == [first[name].sha256 for name in first]
    assert not (folder / "train.verified").exists()  # nor is every byte
    elsewhere = finished(prepare("digits", tmp_path, tmp_path / "cache", found=tmp_path / "of another host"))
    assert elsewhere["test"].path.is_relative_to(tmp_path / "cache")


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
