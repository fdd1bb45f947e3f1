"""Claims about sources: what comes along, CIFAR as torchvision keeps it, folders and tars, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from test_beton import finished

from dtrain.config import Conversion
from dtrain.data.cache import prepare
from dtrain.data.named import SYNTHETIC_SIZES, upsample
from dtrain.data.pictures import Source
from dtrain.data.sources import digest_of, find_source, locate
from dtrain.errors import DataError, DtrainError, UsageError

Pixels = npt.NDArray[np.uint8]


def pixels_of(seed: int, size: int = 4) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


# four training and two test images; the labels of cat and dog are 0 and 1
FILES = {
    "train/cat/1.png": 1,
    "train/cat/2.png": 2,
    "train/dog/1.png": 3,
    "train/dog/2.png": 4,
    "test/cat/1.png": 5,
    "test/dog/1.png": 6,
}


def contents() -> dict[str, bytes]:
    return {name: png(pixels_of(seed)) for name, seed in FILES.items()}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    endings = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}
    with tarfile.open(path, endings[path.suffix]) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in others:
            tar.addfile(info)
    return path


def images_of(source: Source, split: str) -> list[Pixels]:
    return [decode() for decode in source.splits[split].pictures()]


def drained(source: Source) -> dict[str, tuple[list[int], list[bytes]]]:
    return {
        name: (split.labels.tolist(), [image.tobytes() for image in images_of(source, name)])
        for name, split in source.splits.items()
    }


def refusal(dataset: Path | str, data_dir: Path, kind: type[DtrainError] = DataError) -> str:
    """The one line with which a source is refused, when it is opened or while it is read."""
    with pytest.raises(kind) as told:
        drained(find_source(str(dataset), data_dir, download=False))
    assert "\n" not in str(told.value)
    return str(told.value)


# -- built in --------------------------------------------------------------------------------------------------------


def test_digits_are_1437_and_360_real_digits_of_32x32_with_36_of_each_class_held_out(tmp_path: Path) -> None:
    source = find_source("digits", tmp_path)
    train, test = source.splits["train"], source.splits["test"]
    # how often each digit occurs in scikit-learn's load_digits, as its documentation and UCI's page count them
    counts = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert (len(train.labels), len(test.labels), len(source.class_names)) == (1437, 360, 10)
    assert np.bincount(test.labels).tolist() == [36] * 10
    assert (np.bincount(train.labels) + 36).tolist() == counts.tolist()
    images = [*images_of(source, "train"), *images_of(source, "test")]
    assert {(image.shape, str(image.dtype)) for image in images} == {((32, 32, 3), "uint8")}
    assert len({image.tobytes() for image in images}) == 1797


def test_the_digits_of_the_package_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(Path(__file__).parents[1] / "dtrain" / "data" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    # the first digit of load_digits(), a zero, stands in scikit-learn's documentation
    assert images[0, :3].tolist() == [
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
        [0, 3, 15, 2, 0, 11, 8, 0],
    ]
    assert labels[:10].tolist() == list(range(10))
    for name, value in (("KMP_DUPLICATE_LIB_OK", "True"), ("KMP_INIT_AT_FORK", "FALSE")):
        monkeypatch.setenv(name, value)  # else scikit-learn sets them for good
    from sklearn import datasets

    bunch = datasets.load_digits()
    assert np.array_equal(images, bunch.images.astype(np.uint8))
    assert np.array_equal(labels, bunch.target)


def test_upsampling_is_the_bilinear_interpolation_of_torch_to_half_a_level() -> None:
    import torch

    for seed in range(5):
        small = np.random.default_rng(seed).integers(0, 17, (8, 8), dtype=np.uint8)
        wanted = torch.nn.functional.interpolate(
            torch.from_numpy(small.astype(np.float64))[None, None] * (255 / 16), size=(32, 32), mode="bilinear"
        )[0, 0].numpy()
        large = upsample(small)
        assert (large.shape, large.dtype) == ((32, 32, 3), np.uint8)
        for channel in range(3):
            assert np.abs(large[..., channel] - wanted).max() <= 0.5 + 1e-9


def test_synthetic_images_take_no_files_and_are_learnable_by_their_nearest_mean(tmp_path: Path) -> None:
    source = find_source("synthetic", tmp_path / "absent")
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train.labels), len(test.labels)) == (SYNTHETIC_SIZES["train"], SYNTHETIC_SIZES["test"]) == (2000, 400)
    first = np.stack(images_of(source, "train")[:100]).astype(float)
    means = np.stack([first[train.labels[:100] == label].mean(0) for label in range(10)])
    hits = sum(
        int(np.argmin(((means - image) ** 2).sum((1, 2, 3))) == label)
        for image, label in zip(images_of(source, "test"), test.labels, strict=True)
    )
    assert hits >= 396


# -- folders and tars ------------------------------------------------------------------------------------------------


def test_a_folder_and_its_tars_are_one_data_set_with_the_labels_of_sorted_class_names(tmp_path: Path) -> None:
    wanted = {
        "train": ([0, 0, 1, 1], [pixels_of(seed).tobytes() for seed in (1, 2, 3, 4)]),
        "test": ([0, 1], [pixels_of(seed).tobytes() for seed in (5, 6)]),
    }
    paths = [write_folder(tmp_path / "pets", contents())]
    paths += [write_tar(tmp_path / f"pets{ending}", contents()) for ending in (".tar", ".tar.gz", ".tar.xz")]
    for path in paths:
        source = find_source(str(path), tmp_path)
        assert (source.name, source.class_names, source.image_size) == ("pets", ("cat", "dog"), 4)
        assert drained(source) == wanted
        assert drained(source) == wanted  # a stream can be had twice


def test_a_tar_is_read_in_the_order_of_its_members_with_the_same_labels(tmp_path: Path) -> None:
    source = find_source(str(write_tar(tmp_path / "pets.tar", dict(reversed(contents().items())))), tmp_path)
    assert source.class_names == ("cat", "dog")
    assert drained(source)["train"] == ([1, 1, 0, 0], [pixels_of(seed).tobytes() for seed in (4, 3, 2, 1)])


def test_a_tar_is_streamed_and_nothing_of_it_is_written(tmp_path: Path) -> None:
    drained(find_source(str(write_tar(tmp_path / "pets.tar.xz", contents())), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["pets.tar.xz"]


def test_val_is_the_held_out_part_where_there_is_no_test(tmp_path: Path) -> None:
    files = {name.replace("test/", "val/"): data for name, data in contents().items()}
    assert drained(find_source(str(write_folder(tmp_path / "a", files)), tmp_path))["test"][0] == [0, 1]
    both = find_source(
        str(write_folder(tmp_path / "b", {**files, **contents(), "val/cat/9.png": b"no image"})), tmp_path
    )
    assert drained(both)["test"][1] == [pixels_of(seed).tobytes() for seed in (5, 6)]


def test_hidden_files_and_other_folders_are_passed_by(tmp_path: Path) -> None:
    extra = {".DS_Store": b"", "train/.hidden/1.png": b"", "train/cat/._1.png": b"", "README": b"", "more/x/y/z": b""}
    for path in (
        write_folder(tmp_path / "pets", contents() | extra),
        write_tar(tmp_path / "a.tar", contents() | extra),
    ):
        source = find_source(str(path), tmp_path)
        assert (drained(source)["train"][0], source.passed_by) == ([0, 0, 1, 1], ())


def test_files_that_are_no_pictures_by_name_and_content_are_passed_by_and_named(tmp_path: Path) -> None:
    extra = {"train/cat/Thumbs.db": b"\xd0\xcf\x11\xe0", "train/README.txt": b"pets", "test/dog/labels.csv": b"1,2"}
    pictures = {"train/cat/3.jpeg_large": png(pixels_of(7)), "train/dog/no ending": png(pixels_of(8))}
    for path in (
        write_folder(tmp_path / "pets", contents() | extra | pictures),
        write_tar(tmp_path / "a.tar", contents() | extra | pictures),
    ):
        source = find_source(str(path), tmp_path)
        assert sorted(source.passed_by) == sorted(extra)
        assert sorted(drained(source)["train"][0]) == [0, 0, 0, 1, 1, 1]


# -- the side of the pictures ----------------------------------------------------------------------------------------


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


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_in_any_script_and_of_any_bytes_are_read_and_told_on_one_line(tmp_path: Path) -> None:
    names = ["猫", "кот", "ネコ", "قط", "chat é", "cat\nline"]
    files = {f"{part}/{name}/{name}.PNG": png(pixels_of(1)) for part in ("train", "test") for name in names}
    folder = write_folder(tmp_path / "pets", files)
    raw = b"caf\xe9"  # Latin-1
    for part in (b"train", b"test"):
        (Path(os.fsdecode(bytes(folder) + b"/" + part + b"/" + raw))).mkdir()
        Path(os.fsdecode(bytes(folder) + b"/" + part + b"/" + raw + b"/1.png")).write_bytes(png(pixels_of(2)))
    source = find_source(str(folder), tmp_path)
    assert source.class_names == tuple(sorted([*names[:5], "cat\\nline", "caf\\udce9"]))
    assert len(drained(source)["train"][0]) == 7
    packed = tmp_path / "pets.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(folder, "")
    assert find_source(str(packed), tmp_path).class_names == source.class_names
    write_folder(folder, {"train/猫/каша.png": b"x", "train/cat\nline/2.png": b"x"})
    assert "train/cat\\nline/2.png cannot be decoded" in refusal(folder, tmp_path)


def test_classes_of_unequal_size_keep_their_counts(tmp_path: Path) -> None:
    extra = {f"train/cat/more{i}.png": png(pixels_of(i)) for i in range(30)}
    source = find_source(str(write_folder(tmp_path / "pets", contents() | extra)), tmp_path)
    assert np.bincount(source.splits["train"].labels).tolist() == [32, 2]


def test_linked_class_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", contents())
    folder = tmp_path / "subset"
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            (folder / part / name).symlink_to(tmp_path / "pets" / part / name)
    assert drained(find_source(str(folder), tmp_path)) == drained(find_source(str(tmp_path / "pets"), tmp_path))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        special("train/cat/3.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("train/cat/3.png", tarfile.LNKTYPE, "train/cat/1.png"),
        special("train/cat/3.png", tarfile.CHRTYPE),
        special("train/cat/3.png", tarfile.FIFOTYPE),
        tarfile.TarInfo("../train/cat/3.png"),
        tarfile.TarInfo("train/cat/../../../3.png"),
        tarfile.TarInfo("/train/cat/3.png"),
    ],
    ids=["symbolic link", "hard link", "device", "pipe", "parent", "parent inside", "absolute"],
)
def test_a_tar_with_anything_but_plain_files_inside_of_it_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    told = refusal(write_tar(tmp_path / "pets.tar", contents(), member), tmp_path)
    assert repr(member.name) in told
    assert "pack plain files only" in told


def without(*prefixes: str) -> Callable[[], dict[str, bytes]]:
    return lambda: {name: data for name, data in contents().items() if not name.startswith(prefixes)}


def having(**files: bytes) -> Callable[[], dict[str, bytes]]:
    return lambda: contents() | {name.replace("__", "/") + ".png": data for name, data in files.items()}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (without("train"), "found 0 in train/, 0 in val/, 2 in test/"),
        (without("test"), "found 4 in train/, 0 in val/, 0 in test/"),
        (without("train/dog", "test/dog"), "single class 'cat'"),
        (without("train/dog", "test/cat"), "single class 'cat'"),
        (having(test__bird__1=png(pixels_of(9))), "class 'bird' of test/ is not in train/"),
        (having(train__cat__deep__1=png(pixels_of(9))), "train/cat/deep/1.png is not train/CLASS/FILE"),
        (having(train__loose=png(pixels_of(9))), "train/loose.png is not train/CLASS/FILE"),
        (having(train__dog__1=b"no image"), "train/dog/1.png cannot be decoded"),
        (having(train__dog__1=b""), "train/dog/1.png cannot be decoded"),
        (having(train__dog__1=png(pixels_of(9))[:60]), "train/dog/1.png cannot be decoded"),
        (having(train__dog__1=png(pixels_of(9)).replace(b"IDATx", b"IDATy")), "train/dog/1.png cannot be decoded"),
    ],
)
def test_what_cannot_be_a_data_set_is_refused_with_its_reason(
    tmp_path: Path, files: Callable[[], dict[str, bytes]], reason: str
) -> None:
    for path in (write_folder(tmp_path / "pets", files()), write_tar(tmp_path / "pets.tar", files())):
        told = refusal(path, tmp_path)
        assert told.startswith(f"{path}: ")
        assert reason in told


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz"])
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, ending: str) -> None:
    # noise compresses badly, so that a cut hits pixels
    files = {name: png(pixels_of(seed, size=64)) for name, seed in FILES.items()}
    whole = write_tar(tmp_path / f"whole{ending}", files).read_bytes()
    for size in (0, 100, 600, *(len(whole) * tenths // 10 for tenths in range(1, 8))):
        cut = tmp_path / f"cut-{size}{ending}"
        cut.write_bytes(whole[:size])
        assert str(cut) in refusal(cut, tmp_path)
    (tmp_path / f"text{ending}").write_bytes(b"this is no tar\n" * 1000)
    assert "cannot be read as a tar" in refusal(tmp_path / f"text{ending}", tmp_path)


def test_a_tar_cut_between_two_members_or_with_a_damaged_header_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", contents()).read_bytes()
    # each member is a header and a PNG, of 512 bytes both: the fifth begins at 4096, the end at 6144
    assert (whole[4096:4110], whole[6144:]) == (b"test/cat/1.png", bytes(10240 - 6144))
    for name, data in (
        ("between", whole[:4096]),
        ("in-header", whole[: 4096 + 200]),
        ("no-end", whole[:6144]),
        ("damaged", whole[:4096] + b"\xff" + whole[4097:]),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        assert f"{path}: cannot be read as a tar" in refusal(path, tmp_path)


def test_a_member_that_cannot_be_read_any_more_is_told_as_the_sources_fault(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "pets.tar", contents())
    source = find_source(str(path), tmp_path)
    with path.open("r+b") as file:
        file.truncate(2 * 512 + 100)  # cut after it was listed, in its second header
    with pytest.raises(DataError, match=r"pets\.tar"):
        images_of(source, "train")


def test_a_file_that_may_not_be_read_is_named_and_the_cache_not_blamed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pets", contents())
    (folder / "train/dog/1.png").unlink()
    (folder / "train/dog/1.png").symlink_to("/proc/self/mem")  # a plain file whose first page nobody may read
    with pytest.raises(DataError, match=r"pets/train/dog/1\.png: cannot be read \(Input/output error\)"):
        finished(prepare(str(folder), tmp_path, tmp_path / "cache", Conversion(image_size=4)))


def test_a_folder_with_a_pipe_a_broken_link_or_an_empty_class_is_refused(tmp_path: Path) -> None:
    for name, make in (
        ("pipe", lambda path: os.mkfifo(path)),
        ("link", lambda path: path.symlink_to("nowhere")),
        ("class", lambda path: path.mkdir()),
    ):
        folder = write_folder(tmp_path / name, contents())
        make(folder / "train" / "cat" / "odd")
        assert str(folder / "train" / "cat" / "odd") in refusal(folder, tmp_path)
        with pytest.raises(DataError):
            digest_of(locate(str(folder), tmp_path))


def test_a_tar_with_an_empty_class_is_refused(tmp_path: Path) -> None:
    folders = [special(f"./{part}/{name}", tarfile.DIRTYPE) for part in ("train", "test") for name in ("cat", "dog")]
    tar = write_tar(tmp_path / "pets.tar", contents(), *folders)
    assert find_source(str(tar), tmp_path).class_names == ("cat", "dog")
    tar = write_tar(tmp_path / "pets.tar", contents(), *folders, special("./train/fox", tarfile.DIRTYPE))
    assert "pets.tar: train/fox/ is an empty folder; fill or remove it" in refusal(tar, tmp_path)


def test_the_real_images_of_the_excerpt_are_those_that_pillow_reads(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "cifar10_excerpt.tar.xz"
    source = find_source(str(path), tmp_path)
    assert [len(source.splits[name].labels) for name in ("train", "test")] == [2000, 1000]
    assert np.bincount(source.splits["train"].labels).tolist() == [200] * 10
    assert source.digest == "f9bdf5a2f58cc8e1bff5a260a80bc0be1c79a5b05d8f3536ca0aff8208ea6705"  # as DATA.md says
    found: dict[str, list[bytes]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    with lzma.open(path) as plain, tarfile.open(fileobj=io.BytesIO(plain.read())) as tar:
        for info in tar.getmembers():
            part, class_name, _ = info.name.split("/")
            file = tar.extractfile(info)
            assert file is not None
            found[part].append(Image.open(file).convert("RGB").tobytes())
            labels[part].append(class_name)
    for part, split in source.splits.items():
        assert [image.tobytes() for image in images_of(source, part)] == found[part]
        assert [source.class_names[label] for label in split.labels] == labels[part]


# -- digests ---------------------------------------------------------------------------------------------------------


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


# -- CIFAR in torchvision's layout -----------------------------------------------------------------------------------


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined]  # the pickler in Python: its opcodes can be chosen


class _Python2(_Pickler):  # type: ignore[misc]
    """Writes bytes as Python 2 wrote its strings, as in the real files of CIFAR."""

    dispatch = dict(_Pickler.dispatch)

    def save_string(self, value: bytes) -> None:
        short = len(value) < 256
        self.write((b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def python2(value: Any) -> bytes:
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(value)
    return file.getvalue()


CIFARS = {
    "cifar10": (
        "cifar-10-batches-py",
        "batches.meta",
        b"label_names",
        b"labels",
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    ),
    "cifar100": ("cifar-100-python", "meta", b"fine_label_names", b"fine_labels", ["train", "test"]),
}


def write_cifar(data_dir: Path, dataset: str) -> Path:
    """Three images a file, of random pixels; as many classes as the real set."""
    name, meta, names_key, labels_key, files = CIFARS[dataset]
    folder = data_dir / name
    folder.mkdir(parents=True)
    classes = int(dataset.removeprefix("cifar"))
    (folder / meta).write_bytes(python2({names_key: [f"class{i:02}".encode() for i in range(classes)]}))
    for seed, file in enumerate(files):
        rng = np.random.default_rng(seed)
        content = {
            b"batch_label": b"a part",
            labels_key: rng.integers(0, classes, 3).tolist(),
            b"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8),
        }
        (folder / file).write_bytes(python2(content))
    return folder


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # which the import would set, and leave
    from torchvision import datasets  # costs as much as torch, so only here

    folder = write_cifar(tmp_path, dataset)

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    real = getattr(datasets, dataset.upper())
    ours = type(  # torchvision's own reader, with the checksums of our small files
        "Small",
        (real,),
        {
            "train_list": [[name, md5(name)] for name, _ in real.train_list],
            "test_list": [[name, md5(name)] for name, _ in real.test_list],
            "meta": {**real.meta, "md5": md5(real.meta["filename"])},
        },
    )
    source = find_source(dataset, tmp_path, download=False)
    for split, train in (("train", True), ("test", False)):
        wanted = ours(tmp_path, train=train)
        assert source.splits[split].labels.tolist() == wanted.targets
        assert np.array_equal(np.stack(images_of(source, split)), wanted.data)
        assert list(source.class_names) == wanted.classes


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("file", ["batches.meta", "data_batch_3", "test_batch"])
def test_nothing_in_a_pickle_of_cifar_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    folder = write_cifar(tmp_path, "cifar10")
    monkeypatch.chdir(tmp_path)
    (folder / file).write_bytes(pickle.dumps({b"data": _Evil()}))
    assert f"{file}: cannot be read (UnpicklingError: refused to load posix.mkdir)" in refusal("cifar10", tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads((folder / file).read_bytes())  # what it would have done
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("module", ["builtins", "numpy", "os", "numpy._core.multiarray", "functools"])
def test_only_arrays_can_be_named_by_a_pickle_of_cifar(tmp_path: Path, module: str) -> None:
    folder = write_cifar(tmp_path, "cifar10")
    for name in ("eval", "load", "system", "scalar", "partial", "fromfile"):
        (folder / "test_batch").write_bytes(f"c{module}\n{name}\n(I1\ntR.".encode())
        assert f"refused to load {module}.{name}" in refusal("cifar10", tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"text", python2([1, 2]), python2({b"labels": [1]}), None]
    + [python2({b"labels": [1], b"data": data}) for data in (np.zeros((1, 99), np.uint8), np.zeros((1, 3072)), 5)],
)
def test_a_damaged_or_missing_file_of_cifar_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = write_cifar(tmp_path, "cifar10") / "test_batch"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    told = refusal("cifar10", tmp_path)
    assert told.startswith(f"{path}: ")
    assert told.endswith("remove its folder and download it again")


# -- MNIST in torchvision's layout -----------------------------------------------------------------------------------


def idx(array: npt.NDArray[Any]) -> bytes:
    """The IDX format as LeCun's page describes it: 0, 0, type 8, dimensions, each in four bytes, the largest first."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(data_dir: Path, *, zipped: bool) -> Path:
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", 12), ("t10k", 5))):
        rng = np.random.default_rng(seed)
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", rng.integers(0, 10, count, dtype=np.uint8)),
        ):
            data = idx(array)
            name = f"{part}-{kind}-ubyte"
            (raw / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)
    return raw.parent


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # which the import would set, and leave
    from torchvision import datasets  # costs as much as torch, so only here

    write_mnist(tmp_path / "plain", zipped=False)
    folder = write_mnist(tmp_path, zipped=zipped)
    assert locate("mnist", tmp_path, download=False).path == folder
    source = find_source("mnist", tmp_path, download=False)
    assert (source.class_names, source.image_size) == (tuple("0123456789"), 28)
    for split, train in (("train", True), ("test", False)):
        wanted = datasets.MNIST(tmp_path / "plain", train=train)
        assert source.splits[split].labels.tolist() == wanted.targets.tolist()
        images = np.stack(images_of(source, split))
        for channel in range(3):
            assert np.array_equal(images[..., channel], wanted.data.numpy())


def test_the_tar_of_mnist_has_its_known_counts(shared_data: Path, tmp_path: Path) -> None:
    source = find_source(
        "mnist", shared_data, Conversion(image_size=28), download=False
    )  # 28 is its own: no heads read
    counts = [np.bincount(source.splits[name].labels).tolist() for name in ("train", "test")]
    assert counts == [
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ]
    assert source.class_names == tuple("0123456789")
    first = next(source.splits["train"].pictures())()
    assert (first.shape, first.dtype) == ((28, 28, 3), np.uint8)


@pytest.mark.parametrize(
    "content", [b"", b"text", idx(np.zeros((5, 27, 28), np.uint8)), idx(np.zeros((4, 28, 28), np.uint8)), None]
)
def test_a_damaged_or_missing_file_of_mnist_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = write_mnist(tmp_path, zipped=False) / "raw" / "t10k-images-idx3-ubyte"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    told = refusal("mnist", tmp_path)
    assert told.startswith(f"{path}: ")
    assert told.endswith("remove its folder and download it again")


# -- where a name is looked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tar.xz", ""])
def test_a_named_set_is_found_in_the_data_dir(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cifar10{ending}"
    _ = write_tar(path, contents()) if ending else write_folder(path, contents())
    place = locate("cifar10", tmp_path, download=False)
    assert (place.name, place.path) == ("cifar10", path)
    assert drained(find_source("cifar10", tmp_path, download=False))["train"][0] == [0, 0, 1, 1]


def test_torchvisions_own_folder_comes_first(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar10.tar", contents())
    folder = write_cifar(tmp_path, "cifar10")
    assert locate("cifar10", tmp_path).path == folder


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
