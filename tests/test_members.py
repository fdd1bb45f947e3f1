"""Claims about folders and tars: which files are pictures of which class, and what is refused."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from betons import finished
from pets import FILES, contents, drained, images_of, pixels_of, png, refusal, write_folder, write_tar
from PIL import Image

from dtrain.data.cache import prepare
from dtrain.data.sources import digest_of, find_source, locate
from dtrain.errors import DataError
from dtrain.settings.data import Conversion

# -- folders and tars --------------------------------------------------------------------------------------------------


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


# -- names -------------------------------------------------------------------------------------------------------------


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
