"""Claims about CIFAR and MNIST in torchvision's own folders: they are read as torchvision reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pets import contents, images_of, refusal, write_tar

from dtrain.data.sources import find_source, locate
from dtrain.settings.data import Conversion

NO_DOWNLOAD = {"download": "false"}

# -- CIFAR in torchvision's layout -------------------------------------------------------------------------------------


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
    source = find_source(dataset, tmp_path, options=NO_DOWNLOAD)
    for split, train in (("train", True), ("test", False)):
        wanted = ours(tmp_path, train=train)
        assert source.splits[split].labels.tolist() == wanted.targets
        assert np.array_equal(np.stack(images_of(source, split)), wanted.data)
        assert list(source.class_names) == wanted.classes


def test_torchvisions_own_folder_comes_first(tmp_path: Path) -> None:
    write_tar(tmp_path / "cifar10.tar", contents())
    folder = write_cifar(tmp_path, "cifar10")
    assert locate("cifar10", tmp_path).path == folder


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


# -- MNIST in torchvision's layout -------------------------------------------------------------------------------------


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
    assert locate("mnist", tmp_path, NO_DOWNLOAD).path == folder
    source = find_source("mnist", tmp_path, options=NO_DOWNLOAD)
    assert (source.class_names, source.image_size) == (tuple("0123456789"), 28)
    for split, train in (("train", True), ("test", False)):
        wanted = datasets.MNIST(tmp_path / "plain", train=train)
        assert source.splits[split].labels.tolist() == wanted.targets.tolist()
        images = np.stack(images_of(source, split))
        for channel in range(3):
            assert np.array_equal(images[..., channel], wanted.data.numpy())


def test_the_tar_of_mnist_has_its_known_counts(shared_data: Path, tmp_path: Path) -> None:
    source = find_source("mnist", shared_data, Conversion(image_size=28), NO_DOWNLOAD)  # 28 is its own: no heads read
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
