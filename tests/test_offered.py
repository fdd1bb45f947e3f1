"""Claims about data sets that a function offers: what becomes of its labels and pictures, and what is told of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from pets import images_of, refusal

from dtrain.data.sources import digest_of, find_source, locate
from dtrain.errors import DataError, UsageError
from dtrain.settings.data import Conversion

SETS = """
import numpy as np
from PIL import Image

def squares(data_dir, *, count: int = 4, side: int = 8):
    def split():
        labels = [i % 2 for i in range(count)]
        return labels, (np.full((side, side), 100 * label, np.uint8) for label in labels)
    return {"digest": "squares 1", "class_names": ["dark", "light"], "train": split, "test": split}

def images(data_dir):
    def split():
        pictures = [Image.new("RGBA", (90, 70), (255, 0, 0, 0)), np.zeros((70, 90, 3), np.uint8)]
        return np.array([0, 1], np.uint8), pictures
    return {"digest": "1", "class_names": lambda: ["clear", "black"], "train": split, "test": split}

def folder(data_dir):
    return data_dir / "pets"

def wrong(data_dir, *, how: str):
    labels, pictures = [0, 1], [np.zeros((4, 4, 3), np.uint8)] * 2
    if how == "label":
        labels = [0, 2]
    if how == "shares":
        labels = [0.5, 0.5]
    if how == "fewer":
        pictures = pictures[:1]
    if how == "more":
        pictures = pictures * 2
    if how == "floats":
        pictures[1] = np.zeros((4, 4, 3))
    if how == "channels first":
        pictures[1] = np.zeros((3, 4, 4), np.uint8)
    if how == "raises":
        raise KeyError("licence")
    def split():
        return labels if how == "single" else (labels, pictures)
    names = ["only"] if how == "names" else ["a", "b"]
    given = {"digest": "1", "class_names": names, "train": split, "test": split}
    if how == "eager":
        given["test"] = (labels, pictures)
    if how == "lacks":
        del given["digest"]
    return 7 if how == "number" else given
"""


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    (tmp_path / "sets.py").write_text(SETS)
    return tmp_path / "sets.py"


def test_labels_and_arrays_are_what_the_function_gives_in_their_own_size(sets: Path, tmp_path: Path) -> None:
    source = find_source(f"{sets}:squares", tmp_path)
    assert (source.name, source.class_names, source.image_size) == ("squares", ("dark", "light"), 8)
    assert source.splits["train"].labels.tolist() == [0, 1, 0, 1]
    images = np.stack(images_of(source, "test"))
    assert (images.shape, images.dtype) == ((4, 8, 8, 3), np.uint8)
    assert images.reshape(4, -1).tolist() == [[100 * label] * 192 for label in (0, 1, 0, 1)]
    asked = find_source(f"{sets}:squares", tmp_path, Conversion(image_size=5), {"count": "6", "side": "70"})
    assert np.stack(images_of(asked, "train")).shape == (6, 5, 5, 3)
    assert find_source(f"{sets}:squares", tmp_path, options={"side": "70"}).image_size == 70


def test_pillow_images_follow_the_rule_for_pictures_and_unequal_ones_are_brought_to_224(
    sets: Path, tmp_path: Path
) -> None:
    source = find_source(f"{sets}:images", tmp_path)
    clear, black = images_of(source, "train")
    assert source.class_names == ("clear", "black")
    assert clear.shape == black.shape == (224, 224, 3)
    assert (clear.min(), black.max()) == (255, 0)  # transparency lies over white


def test_a_path_is_read_as_if_it_had_been_given_itself(sets: Path, tmp_path: Path) -> None:
    assert "returns the path" in refusal(f"{sets}:folder", tmp_path)
    (tmp_path / "pets").mkdir()
    place = locate(f"{sets}:folder", tmp_path)
    assert (place.name, place.path) == ("folder", tmp_path / "pets")


def test_the_digest_changes_with_what_the_function_says_its_options_and_its_file(sets: Path, tmp_path: Path) -> None:
    def digest(**options: str) -> str:
        return digest_of(locate(f"{sets}:squares", tmp_path, options))

    first = digest()
    assert digest() == first
    assert len({first, digest(count="6"), digest(count="8"), digest(side="8")}) == 4
    sets.write_text(SETS.replace("squares 1", "squares 2"))
    assert digest() != first


def test_the_digest_of_what_comes_with_dtrain_is_what_it_always_was(tmp_path: Path) -> None:
    # as sha256sum prints it of "digits 1": betons and checkpoints of earlier versions hold it
    digest = "b6d015f5f9dfbc55415f5a72d0e25ff1fffc3d3ad04b17cf202f96890d45948c"
    assert digest_of(locate("digits", tmp_path)) == digest
    assert digest_of(locate("dtrain::digits", tmp_path)) == digest


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("label", "train holds a label outside 0..1"),
        ("shares", "2 classes and, in train, labels of float64 [2]"),
        ("names", "1 classes and, in train, labels of int64 [2]; two classes or more"),
        ("fewer", "train has 2 labels and 1 pictures"),
        ("more", "train has 2 labels and more pictures"),
        ("floats", "picture 1 of train cannot be decoded (is float64 [4, 4, 3]; give uint8 [H, W]"),
        ("channels first", "picture 1 of train cannot be decoded (is uint8 [3, 4, 4]; give uint8 [H, W]"),
        ("raises", "fails: KeyError: 'licence'"),
        ("eager", "must return text as digest and functions as train and test"),
        ("lacks", "returns a mapping without digest"),
        ("number", "returns a int; plugins/README.md says what a data set returns"),
    ],
)
def test_what_is_wrong_with_a_function_is_one_line_that_names_it(
    sets: Path, tmp_path: Path, how: str, told: str
) -> None:
    with pytest.raises(DataError, match=re.escape(told)) as refused:
        source = find_source(f"{sets}:wrong", tmp_path, options={"how": how})
        for part in ("train", "test"):
            images_of(source, part)
    assert str(refused.value).startswith(f"data set {sets}:wrong of sets.py local")
    assert "\n" not in str(refused.value)


def test_options_of_what_has_none_are_refused(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    with pytest.raises(UsageError, match="--dataset-opt side: .* is no named data set"):
        locate(str(tmp_path / "pets"), tmp_path, {"side": "3"})
    with pytest.raises(UsageError, match="data set digits has no option 'side'"):
        locate("digits", tmp_path, {"side": "3"})
