"""Where images come from: a named set, a folder or a tar -> Source: class names, labels, and a stream of images.

A folder or tar holds `train/CLASS/FILE` and `test/CLASS/FILE` (or `val/`; `test/` wins where both are there). A tar is
streamed, never extracted, in the order of its members; a folder is read in sorted order. Labels index the sorted class
names. In this storey every image of a set is square and of one size; gray becomes RGB.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import pickle
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from dtrain.errors import DataError, UsageError, nearest
from dtrain.files import PARTIAL, Lock, canonical_json, sha256_of
from dtrain.keyed import Stream, integers, key

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

TAR_ENDINGS = (".tar", ".tar.gz", ".tar.xz")


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a source. labels: int64 [N]; images(): a fresh stream of N uint8 [S, S, 3], in the labels' order."""

    labels: Labels
    images: Callable[[], Iterator[Images]]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set that is not converted yet; splits always has "train" and "test". digest: see `digest_of`."""

    name: str
    class_names: tuple[str, ...]
    image_size: int
    digest: str
    splits: dict[str, Split]


@dataclass(frozen=True)
class Place:
    """What `--dataset` was found to mean: a name for the cache, and a tar or folder; no path for what is built in."""

    name: str
    path: Path | None


def find_source(dataset: str, data_dir: Path, *, download: bool = True) -> Source:
    """The source called `dataset`: a name, or a path to a folder or tar.

    Raises what `locate` raises, and DataError for what cannot be a data set: no classes, one class, a test class that
    train lacks, a link in a tar, an image that cannot be decoded. Lists all members and decodes one image: seconds.
    """
    return open_source(locate(dataset, data_dir, download=download))


def locate(dataset: str, data_dir: Path, *, download: bool = True) -> Place:
    """Where `dataset` is, without reading it; a CIFAR that is nowhere is downloaded by torchvision if `download`.

    Looked for: built in; in `data_dir` torchvision's own folder, `<dataset>/`, `<dataset>.tar[.gz|.xz]`; a path.
    Raises UsageError for a name nobody knows, DataError for a known one that is not there. Cheap.
    """
    if dataset in BUILT_IN:
        return Place(dataset, None)
    names = ([CIFAR[dataset].folder] if dataset in CIFAR else []) + [dataset, *(dataset + end for end in TAR_ENDINGS)]
    for candidate in [data_dir / name for name in names] + [Path(dataset)]:
        if candidate.is_dir() or (candidate.is_file() and candidate.name.endswith(TAR_ENDINGS)):
            return Place(_stem(dataset), candidate)
    if dataset in CIFAR:
        looked = f"--dataset {dataset}: none of {', '.join(names)} in {data_dir.absolute()}"
        if not download:
            raise DataError(f"{looked}; put one there, name its folder with --data-dir, or try --dataset digits")
        return Place(dataset, _download(CIFAR[dataset], data_dir, looked))
    if os.sep in dataset or dataset.endswith(TAR_ENDINGS):
        raise DataError(f"--dataset {dataset}: no such folder or tar ({', '.join(TAR_ENDINGS)})")
    hint = nearest(dataset, [*BUILT_IN, *CIFAR])
    raise UsageError(f"--dataset {dataset}: no such name, path, or folder or tar in {data_dir.absolute()}; {hint}")


def digest_of(place: Place, memo: Path | None = None) -> str:
    """64 hex digits that change when the content does.

    Of a tar: the SHA-256 of its bytes, remembered in the file `memo` by size and time of change. Of a folder: the
    SHA-256 of the names, sizes and times of its files, so that a start need not read them. Of what is built in: of its
    name and version.
    """
    if place.path is None:
        return hashlib.sha256(f"{place.name} 1".encode()).hexdigest()
    try:
        if place.path.is_file():
            return sha256_of(place.path) if memo is None else remembered_sha256(place.path, memo)
        stats = [(name, (place.path / name).stat()) for name in _files(place.path)]
    except OSError as error:
        raise DataError(f"{place.path}: cannot be read ({error})") from error
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(canonical_json(rows)).hexdigest()


def remembered_sha256(path: Path, memo: Path) -> str:
    """The SHA-256 of a file, computed again only when its size or time of change is not what `memo` remembers.

    A memo that cannot be read or written costs time, nothing else.
    """
    stat = path.stat()
    known = f"{stat.st_size} {stat.st_mtime_ns}"
    with suppress(OSError, ValueError):
        size, changed, digest = memo.read_text(encoding="ascii").split()
        if f"{size} {changed}" == known:
            return digest
    digest = sha256_of(path)
    with suppress(OSError):
        # Not whole_file: half a memo does not parse, and two fsyncs at each first use would buy nothing.
        memo.write_text(f"{known} {digest}\n", encoding="ascii")
    return digest


def open_source(place: Place) -> Source:
    """Read what `locate` found as far as class names, labels and image size; see `find_source`."""
    if place.path is None:
        return BUILT_IN[place.name](digest_of(place))
    for cifar in CIFAR.values():
        if (place.path / cifar.names_file).is_file():
            return _open_cifar(cifar, place.name, place.path, digest_of(place))
    return _open_members(place.name, place.path, digest_of(place))


def _stem(dataset: str) -> str:
    name = Path(dataset).absolute().name
    return next((name.removesuffix(end) for end in TAR_ENDINGS if name.endswith(end)), name)


# --- folders and tars: one stream of members


@dataclass(frozen=True)
class _Member:
    folder: str  # train, val or test
    class_name: str
    name: str
    read: Callable[[], bytes]


def _open_members(name: str, path: Path, digest: str) -> Source:
    classes: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    first: Images | None = None
    for member in _members(path):
        first = _decode(path, member, None) if first is None else first
        classes[member.folder].append(member.class_name)
    held_out = "test" if classes["test"] else "val"
    if first is None or not classes["train"] or not classes[held_out]:
        raise DataError(
            f"{path}: needs images in train/CLASS/ and in test/CLASS/ (or val/CLASS/); found {_counts(classes)}"
        )
    class_names = tuple(sorted(set(classes["train"])))
    if len(class_names) < 2:
        raise DataError(f"{path}: train/ has the single class {class_names[0]!r}; two or more are needed")
    if strange := sorted(set(classes[held_out]) - set(class_names)):
        raise DataError(f"{path}: class {strange[0]!r} of {held_out}/ is not in train/; add, rename or remove it")
    size = first.shape[0]
    label_of = {class_name: label for label, class_name in enumerate(class_names)}

    def stream(folder: str) -> Iterator[Images]:
        return (_decode(path, member, size) for member in _members(path) if member.folder == folder)

    splits = {
        split: Split(np.array([label_of[c] for c in classes[folder]], dtype=np.int64), partial(stream, folder))
        for split, folder in (("train", "train"), ("test", held_out))
    }
    return Source(name, class_names, size, digest, splits)


def _counts(classes: dict[str, list[str]]) -> str:
    return ", ".join(f"{len(found)} in {folder}/" for folder, found in classes.items())


def _members(path: Path) -> Iterator[_Member]:
    """Every image file below train/, val/ and test/, in a fixed order; what is hidden or elsewhere is passed by."""
    for name, read in _tar_files(path) if path.is_file() else _folder_files(path):
        parts = PurePosixPath(name).parts
        if parts[:1] not in (("train",), ("val",), ("test",)) or any(part.startswith(".") for part in parts):
            continue
        if len(parts) != 3:
            raise DataError(f"{path}: {name} is not {parts[0]}/CLASS/FILE; move or remove it")
        yield _Member(parts[0], parts[1], name, read)


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, as sorted posix paths relative to it; links are followed, here as in torchvision."""
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if not folders and not names:
            raise DataError(f"{root}: an empty folder; fill or remove it")
        for name in sorted(names):
            path = Path(root) / name
            if not path.is_file():  # reading a pipe would wait for ever
                raise DataError(f"{path}: neither a file nor a folder (a broken link, a device); remove it")
            yield path.relative_to(folder).as_posix()


def _folder_files(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    return ((name, (folder / name).read_bytes) for name in _files(folder))


class _Header(tarfile.TarInfo):
    """tarfile takes any header that is cut off or damaged, but the first, for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):  # the end, as it should be
                raise
            raise tarfile.ReadError(str(error)) from error


def _tar_files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    try:
        with tarfile.open(path, tarinfo=_Header) as tar:
            for info in tar:
                parts = PurePosixPath(info.name).parts
                if info.isdir():
                    continue
                if not info.isreg() or info.name.startswith("/") or ".." in parts:
                    raise DataError(
                        f"{path}: {info.name!r} is a link, a device or leads outside; pack plain files only"
                    )
                yield "/".join(parts), partial(_read_member, tar, info)
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        reason = str(error).split(":")[0].split("\n")[0]
        raise DataError(
            f"{path}: cannot be read as a tar ({reason}); it is cut short, damaged or something else"
        ) from error


def _read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    return b"" if file is None else file.read()


def _decode(path: Path, member: _Member, size: int | None) -> Images:
    """One image as uint8 [S, S, 3]; DataError, naming it, if it is damaged or not square or not of `size`."""
    try:
        with Image.open(io.BytesIO(member.read())) as image:
            width, height = image.size
            if image.mode[0] in "IF":
                raise DataError(f"{path}: {member.name} has more than 8 bits a channel; convert it to 8")
            pixels = None if (width, height) != (size or height,) * 2 else np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # tar and Pillow's decoders raise nearly every kind: OSError, SyntaxError, zlib.error
        raise DataError(f"{path}: {member.name} cannot be decoded ({error}); replace or remove it") from error
    if pixels is None:
        wanted = f"{size}x{size}, as the first image is" if size else "square"
        raise DataError(
            f"{path}: {member.name} is {width}x{height}, not {wanted}; crop or resize all to one square size"
        )
    return pixels


# --- CIFAR in torchvision's own layout


@dataclass(frozen=True)
class _Cifar:
    torchvision_name: str
    folder: str
    names_file: str
    names_key: bytes
    labels_key: bytes
    files: dict[str, tuple[str, ...]]


CIFAR = {
    "cifar10": _Cifar(
        "CIFAR10",
        "cifar-10-batches-py",
        "batches.meta",
        b"label_names",
        b"labels",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
    ),
    "cifar100": _Cifar(
        "CIFAR100",
        "cifar-100-python",
        "meta",
        b"fine_label_names",
        b"fine_labels",
        {"train": ("train",), "test": ("test",)},
    ),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of CIFAR, which hold dicts, lists, bytes and numpy arrays, and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # where it lives depends on numpy's version
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _unpickle(path: Path, entry: bytes) -> Any:
    """One entry of the dict that a file of CIFAR is."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding="bytes").load()[entry]
    except Exception as error:  # a damaged pickle raises nearly every kind
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be read ({reason}); remove its folder and download it again") from error


def _open_cifar(cifar: _Cifar, name: str, path: Path, digest: str) -> Source:
    class_names = tuple(found.decode() for found in _unpickle(path / cifar.names_file, cifar.names_key))

    def stream(files: tuple[str, ...]) -> Iterator[Images]:
        for file in files:
            rows = np.asarray(_unpickle(path / file, b"data"))
            if rows.dtype != np.uint8 or rows.shape[1:] != (3 * 32 * 32,):
                raise DataError(f"{path / file}: holds no images of 32x32; remove its folder and download it again")
            yield from rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    splits = {
        split: Split(
            np.array([label for file in files for label in _unpickle(path / file, cifar.labels_key)], dtype=np.int64),
            partial(stream, files),
        )
        for split, files in cifar.files.items()
    }
    return Source(name, class_names, 32, digest, splits)


def _download(cifar: _Cifar, data_dir: Path, looked: str) -> Path:
    """Download by torchvision, into `data_dir` whole or not at all; one process does it, the others wait for it."""
    from torchvision import datasets  # costs as much as torch, so only here

    folder = data_dir / cifar.folder
    lock = Lock(data_dir / f".{cifar.folder}.lock")
    try:
        while not lock.acquire():
            time.sleep(0.05)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=data_dir) as part:
                getattr(datasets, cifar.torchvision_name)(part, download=True)
                (Path(part) / cifar.folder).rename(folder)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{looked}, and no download ({reason}); --dataset digits needs neither") from error
    finally:
        lock.release()
    return folder


# --- built in


def digits(digest: str) -> Source:
    """1,797 real handwritten digits (digits.txt says whose), 8x8 upsampled to 32x32; 36 of each class are the test."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        small, labels = file["images"], file["labels"].astype(np.int64)
    keys = key(0, Stream.SPLIT, np.arange(len(labels)))
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        is_test[members[np.argsort(keys[members], kind="stable")[:36]]] = True

    def stream(chosen: npt.NDArray[np.bool_]) -> Iterator[Images]:
        return (upsample(image) for image in small[chosen])

    splits = {
        name: Split(labels[chosen], partial(stream, chosen))
        for name, chosen in (("train", ~is_test), ("test", is_test))
    }
    return Source("digits", tuple("0123456789"), 32, digest, splits)


def upsample(image: Images) -> Images:
    """A digit uint8 [8, 8] in 0..16 -> uint8 [32, 32, 3] in 0..255, by bilinear interpolation in whole numbers.

    Pixel centres are aligned (as torch's align_corners=False): pixel x of 32 lies at (2x - 3) / 8 of 8, with the edge
    repeated. Weights are eighths, so the sum is exact and rounded once, half up: equal on every machine.
    """
    position = np.clip(2 * np.arange(32) - 3, 0, 8 * 7)
    left, weight = position // 8, position % 8
    right = np.minimum(left + 1, 7)
    wide = image.astype(np.int64)
    wide = wide[:, left] * (8 - weight) + wide[:, right] * weight
    full = wide[left] * (8 - weight)[:, None] + wide[right] * weight[:, None]
    gray = ((full * 255 + 512) // 1024).astype(np.uint8)  # 1024 = 16 levels x 8 x 8
    return np.repeat(gray[:, :, None], 3, axis=2)


SYNTHETIC_SIZES = {"train": 2000, "test": 400}


def synthetic(digest: str) -> Source:
    """Ten keyed patterns of 4x4 coloured blocks under keyed noise, 32x32, learnable in an epoch; needs no files."""
    patterns = 64 + integers(key(0, Stream.SYNTHETIC, 0, np.arange(10 * 4 * 4 * 3)), 128).reshape(10, 4, 4, 3)
    patterns = patterns.repeat(8, axis=1).repeat(8, axis=2)

    def stream(first: int, labels: Labels) -> Iterator[Images]:
        for index, label in enumerate(labels, first):
            noise = integers(key(0, Stream.SYNTHETIC, 1, index, np.arange(32 * 32 * 3)), 128).reshape(32, 32, 3) - 64
            yield (patterns[label] + noise).astype(np.uint8)

    splits, first = {}, 0
    for name, count in SYNTHETIC_SIZES.items():
        labels = np.arange(count, dtype=np.int64) % 10
        splits[name] = Split(labels, partial(stream, first, labels))
        first += count
    return Source("synthetic", tuple(f"pattern {i}" for i in range(10)), 32, digest, splits)


BUILT_IN: dict[str, Callable[[str], Source]] = {"digits": digits, "synthetic": synthetic}
