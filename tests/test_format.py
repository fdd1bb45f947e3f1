"""Claims about damaged betons: whatever is cut, moved, flipped or missing is refused with its reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from betons import COUNT, HEAD, converted, edit, number, pixels_of, source_of

from dtrain.commands import data
from dtrain.data.beton import open_beton, verify_beton
from dtrain.data.format import ALLOCATION, PAGE, SAMPLE
from dtrain.errors import DataError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound beton; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("sound")
    converted(folder, source_of(pixels_of(COUNT), pixels_of(COUNT)[:20]))
    return folder


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
