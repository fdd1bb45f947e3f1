"""Claims about sources: what comes along, CIFAR as torchvision keeps it, folders and tars, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pets import FILES, contents, drained, images_of, pixels_of, png, refusal, write_folder, write_tar

from dtrain.data.sources import digest_of, find_source, locate
from dtrain.errors import DataError, UsageError
from dtrain.settings.data import Conversion

NO_DOWNLOAD = {"download": "false"}

# -- the side of the pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(4, 4)] * 6, 4),
        ([(64, 64)] * 6, 64),
        ([(65, 65)] * 6, 224),
        ([(4, 4)] * 5 + [(5, 5)], 224),
        ([(4, 4)] * 5 + [(4, 5)], 224),
        ([(4, 5)] * 6, 224),
        ([(0, 0)] + [(4, 4)] * 5, 4),  # a damaged one says nothing
    ],
)
def test_small_equal_squares_keep_their_size_and_all_else_is_brought_to_224(
    tmp_path: Path, shapes: list[tuple[int, int]], size: int
) -> None:
    files = {
        name: png(np.zeros((*shape, 3), np.uint8)) if shape[0] else b"damaged"
        for name, shape in zip(FILES, shapes, strict=True)
    }
    for path in (write_folder(tmp_path / "pets", files), write_tar(tmp_path / "pets.tar", files)):
        assert find_source(str(path), tmp_path).image_size == size
        assert find_source(str(path), tmp_path, Conversion(image_size=48)).image_size == 48
        assert find_source(str(path), tmp_path, Conversion(image_size=48, store_size=60)).image_size == 60


def test_named_sets_have_their_own_size_unless_another_is_asked_for(tmp_path: Path) -> None:
    assert find_source("digits", tmp_path).image_size == 32
    asked = find_source("digits", tmp_path, Conversion(image_size=40))
    plain, large = images_of(find_source("digits", tmp_path), "test"), images_of(asked, "test")
    assert (asked.image_size, {image.shape for image in large}) == (40, {(40, 40, 3)})
    # the same picture, only larger
    assert abs(float(np.mean(plain)) - float(np.mean(large))) < 1


# -- digests -----------------------------------------------------------------------------------------------------------


def test_a_digest_changes_with_the_content_and_only_then(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "pets.tar", contents())
    memo = tmp_path / "memo"
    digest = digest_of(locate(str(tar), tmp_path), memo)
    assert digest == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert digest_of(locate(str(tar), tmp_path), memo) == digest
    write_tar(tar, dict(reversed(contents().items())))
    assert digest_of(locate(str(tar), tmp_path), memo) == hashlib.sha256(tar.read_bytes()).hexdigest() != digest
    folder = write_folder(tmp_path / "pets", contents())
    before = digest_of(locate(str(folder), tmp_path))
    assert digest_of(locate(str(folder), tmp_path)) == before
    write_folder(folder, {"train/cat/3.png": png(pixels_of(7))})
    assert digest_of(locate(str(folder), tmp_path)) != before


def test_a_memo_that_is_damaged_is_as_good_as_none(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "pets.tar", contents())
    for text in (b"", b"1 2", b"\xff\xfe", b"1 2 3 4"):
        (tmp_path / "memo").write_bytes(text)
        assert digest_of(locate(str(tar), tmp_path), tmp_path / "memo") == hashlib.sha256(tar.read_bytes()).hexdigest()


# -- where a name is looked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ""])
def test_a_named_set_is_found_in_the_data_dir(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cifar10{ending}"
    _ = write_tar(path, contents()) if ending else write_folder(path, contents())
    place = locate("cifar10", tmp_path, NO_DOWNLOAD)
    assert (place.name, place.path) == ("cifar10", path)
    assert drained(find_source("cifar10", tmp_path, options=NO_DOWNLOAD))["train"][0] == [0, 0, 1, 1]


def test_a_name_that_nobody_knows_is_a_usage_error_that_names_the_nearest(tmp_path: Path) -> None:
    assert refusal("cifar1", tmp_path, UsageError).endswith("did you mean 'cifar10'?")
    assert str(tmp_path) in refusal("quux", tmp_path, UsageError)


def test_a_path_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    assert "no such folder or tar" in refusal(tmp_path / "absent", tmp_path)
    assert "no such folder or tar" in refusal("absent.tar.xz", tmp_path)


def test_without_a_network_one_line_says_what_was_looked_for_where_and_names_digits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dtrain", "data", "convert", "cifar10"]
    command += ["--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **nowhere, "no_proxy": "", "NO_PROXY": ""}
    )
    assert (done.returncode, done.stdout) == (DataError.exit_code, "")
    (line,) = done.stderr.splitlines()
    for words in (
        "--dataset cifar10",
        "cifar-10-batches-py",
        "cifar10.tar.xz",
        f"in {tmp_path / 'data'}",
        "--dataset digits",
    ):
        assert words in line
    assert [path for path in (tmp_path / "data").iterdir() if not path.name.endswith(".lock")] == []


def test_two_tars_of_one_name_size_and_time_are_two_data_sets(tmp_path: Path) -> None:
    digests = set()
    for fold in ("a", "b"):
        tar = tmp_path / fold / "pets.tar"
        tar.parent.mkdir()
        write_tar(tar, {name: png(np.full((4, 4, 3), ord(fold), np.uint8)) for name in FILES})
        os.utime(tar, (1_000_000_000, 1_000_000_000))
        digests.add((tar.stat().st_size, digest_of(locate(str(tar), tmp_path), tmp_path / "memo")))
    assert len({size for size, _ in digests}) == 1
    assert len(digests) == 2
