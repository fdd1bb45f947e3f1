"""Betons: FFCV's file format, written and read with numpy alone. One file a split, checked before each use.

Layout (FFCV 1.0.2, version 2): header; a descriptor for each field; a record for each sample (mode, width, height and
position of its pixels; its label); pages of pixels; the table of allocations. Beside it stands a sidecar JSON with what
the format has no place for. FFCV's own writer hangs on any error and does not give the same bytes twice.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.sources import Source, Split, digest_of, locate, open_source
from dtrain.errors import DataError, ProcessError, StorageError
from dtrain.files import Lock, remove_partials, sha256_of, whole_file, write_json

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("position", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("position", "<u8"), ("size", "<u8")])
VERSION, INT_FIELD, IMAGE_FIELD, RAW = 2, 1, 2, 1
PAGE = 2 << 20  # FFCV's smallest, so that small sets stay small
RAW_LIMIT = 4 << 30  # bytes of a split that are stored raw
DECODED_AHEAD = 256  # images
CONVERSION_SECONDS = 3600.0  # that a process waits for another one's conversion


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: images done of total, of one split."""

    split: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Beton:
    """One split, converted. labels: int64 [N]; pixel_offsets: uint64 [N], where each image's bytes begin in the file.

    mean, std: per channel in 0..1, of this split.
    """

    path: Path
    split: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    labels: npt.NDArray[np.int64]
    pixel_offsets: npt.NDArray[np.uint64]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    source_digest: str


def write_beton(path: Path, split: Split, size: int, source: Source, split_name: str) -> Iterator[Progress]:
    """Write one split, whole or not at all, with its sidecar; yields progress.

    Streams: one page of pixels in memory. The same source gives the same bytes. Raises StorageError for a full disk,
    DataError for a stream that is not what the split promised.
    """
    count, image_bytes = len(split.labels), size * size * 3
    if count * image_bytes > RAW_LIMIT:
        raise DataError(
            f"{source.name}/{split_name}: {count} images of {size}x{size} take more than {RAW_LIMIT >> 30} GiB raw, "
            "which this version does not convert; make the images smaller"
        )
    records = np.zeros(count, SAMPLE)
    table = np.zeros(count, ALLOCATION)
    records["label"], records["image"]["mode"] = split.labels, RAW
    records["image"]["width"] = records["image"]["height"] = size
    start = -(-(HEADER.itemsize + 2 * FIELD.itemsize + records.nbytes) // PAGE) * PAGE
    page_bytes = max(PAGE, 1 << (image_bytes - 1).bit_length())  # FFCV: a power of two; an image lies in one page
    per_page = page_bytes // image_bytes
    positions = start + np.arange(count) // per_page * page_bytes + np.arange(count) % per_page * image_bytes
    records["image"]["position"] = table["position"] = positions
    table["sample"], table["size"] = np.arange(count), image_bytes
    pages = -(-count // per_page)
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    with whole_file(path) as part:
        with part.open("wb") as file:
            file.write(np.array([(VERSION, 2, page_bytes, count, start + pages * page_bytes)], HEADER).tobytes())
            file.write(_descriptors().tobytes())
            file.write(records.tobytes())
            file.write(bytes(start - file.tell()))
            done = 0
            for page in _pages(split, size, per_page):
                for channel in range(3):
                    histogram = np.bincount(page[..., channel].ravel(), minlength=256)
                    sums[channel] += int(histogram @ np.arange(256))
                    squares[channel] += int(histogram @ np.arange(256) ** 2)
                file.write(page.tobytes().ljust(page_bytes, b"\0"))
                done += len(page)
                yield Progress(split_name, done, count)
            if done != count:
                raise DataError(f"{source.name}/{split_name}: {count} images were listed, {done} came")
            file.write(table.tobytes())
        pixels = count * size * size
        mean = sums / pixels / 255
        facts = {
            "format": 1,
            "split": split_name,
            "images": count,
            "image_size": size,
            "channels": 3,
            "class_names": list(source.class_names),
            "mean": mean.tolist(),
            "std": np.sqrt(np.maximum(squares / pixels / 255**2 - mean**2, 1e-12)).tolist(),
            "sha256": sha256_of(part),
            "source_digest": source.digest,
        }
        # before the beton: a beton without sidecar must not be, a sidecar without beton does no harm
        write_json(path.with_suffix(".json"), facts)


def _pages(split: Split, size: int, per_page: int) -> Iterator[npt.NDArray[np.uint8]]:
    page: list[npt.NDArray[np.uint8]] = []
    for image in split.images():
        if image.shape != (size, size, 3):
            raise DataError(f"an image of shape {image.shape} came where {size}x{size} RGB was promised")
        page.append(image)
        if len(page) == per_page:
            yield np.stack(page)
            page = []
    if page:
        yield np.stack(page)


def _descriptors() -> npt.NDArray[Any]:
    fields = np.zeros(2, FIELD)
    for field, (number, name) in zip(fields, ((IMAGE_FIELD, b"image"), (INT_FIELD, b"label")), strict=True):
        field["type"] = number
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return fields


# -- reading ---------------------------------------------------------------------------------------------------------


def open_beton(path: Path) -> Beton:
    """Check a beton's structure and return what it holds; its bytes too, on first use after it changed on disk.

    Raises DataError with the reason. FFCV crashes, hangs or gives wrong pixels on the damage that is refused here.
    """
    facts = _sidecar(path)
    try:
        stat = path.stat()
        with path.open("rb") as file:
            content = _structure(path, np.memmap(file, np.uint8, "r") if stat.st_size else np.zeros(0, np.uint8), facts)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; convert the data set again") from None
    beton = Beton(path=path, **content, **_of_sidecar(facts))
    _verify_once(beton, stat)
    return beton


def _sidecar(path: Path) -> dict[str, Any]:
    sidecar = path.with_suffix(".json")
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        if (
            set(facts) >= {"split", "images", "image_size", "class_names", "sha256", "source_digest"}
            and len(facts["mean"]) == len(facts["std"]) == facts["channels"] == 3
            and all(0 <= mean <= 1 for mean in facts["mean"])
            and all(0 < std <= 1 for std in facts["std"])
            and all(isinstance(name, str) for name in facts["class_names"])
        ):
            return dict(facts)
        reason = "lacks entries or has wrong ones"
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DataError(f"{sidecar}: {reason}; remove the folder and convert the data set again")


def _of_sidecar(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "split": facts["split"],
        "class_names": tuple(facts["class_names"]),
        "image_size": facts["image_size"],
        "channels": facts["channels"],
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "sha256": facts["sha256"],
        "source_digest": facts["source_digest"],
    }


def _structure(  # noqa: C901 - a list of refusals
    path: Path, flat: npt.NDArray[np.uint8], facts: dict[str, Any]
) -> dict[str, Any]:
    def refuse(reason: str) -> DataError:
        return DataError(f"{path}: {reason}; remove the folder and convert the data set again")

    if len(flat) < HEADER.itemsize + 2 * FIELD.itemsize:
        raise refuse("too short to be a beton")
    head = flat[: HEADER.itemsize].view(HEADER)[0]
    if head["version"] != VERSION or head["fields"] != 2:
        raise refuse("not a beton of this version")
    begin = HEADER.itemsize + 2 * FIELD.itemsize
    if flat[HEADER.itemsize : begin].tobytes() != _descriptors().tobytes():
        raise refuse("its fields are not one image and one label")
    count, table_at = int(head["samples"]), int(head["table"])
    if count != facts["images"]:
        raise refuse(f"holds {count} samples, its sidecar says {facts['images']}")
    first = begin + count * SAMPLE.itemsize
    if table_at < first or table_at + count * ALLOCATION.itemsize != len(flat):
        raise refuse("unfinished or cut short")
    records = flat[begin:first].view(SAMPLE)
    table = flat[table_at:].view(ALLOCATION)
    size = facts["image_size"]
    image = records["image"]
    if (image["width"] != size).any() or (image["height"] != size).any() or (image["mode"] != RAW).any():
        raise refuse(f"holds an image that is not raw {size}x{size}")
    if (table["sample"] != np.arange(count)).any() or (table["position"] != image["position"]).any():
        raise refuse("its table of samples is damaged")
    if (image["position"] < first).any() or (image["position"] > max(table_at - size * size * 3, 0)).any():
        raise refuse("a sample's pixels lie outside of the file")
    labels = records["label"].astype(np.int64)
    classes = len(facts["class_names"])
    if (labels < 0).any() or (labels >= classes).any():
        raise refuse(f"holds a label outside 0..{classes - 1}")
    return {"labels": labels, "pixel_offsets": image["position"].astype(np.uint64)}


def verify_beton(path: Path) -> Beton:
    """Structure and every byte of a beton. Raises DataError. Reads the whole file."""
    beton = open_beton(path)
    if sha256_of(path) != beton.sha256:
        raise DataError(f"{path}: its bytes are not those that were written; remove the folder and convert again")
    return beton


def _verify_once(beton: Beton, stat: os.stat_result) -> None:
    """Read every byte on the first use after a change of size or time, and remember that in a file beside it."""
    memo = beton.path.with_suffix(".verified")
    known = f"{stat.st_size} {stat.st_mtime_ns} {beton.sha256}"
    with contextlib.suppress(OSError):
        if memo.read_text(encoding="ascii") == known:
            return
    if sha256_of(beton.path) != beton.sha256:
        raise DataError(f"{beton.path}: its bytes are not those that were written; remove the folder and convert again")
    with contextlib.suppress(OSError):  # a cache that cannot be written is verified again next time
        memo.write_text(known, encoding="ascii")


# -- the cache -------------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """The user's cache folder for betons: $XDG_CACHE_HOME/dtrain or ~/.cache/dtrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain"


def convert(source: Source, folder: Path) -> Iterator[Progress]:
    """Write every split of a source to `folder`; yields progress, draws nothing. Splits that are there are kept.

    An error, a full disk or Ctrl-C leaves no beton. Call it with the folder's lock held.
    """
    remove_partials(folder)
    for name, split in source.splits.items():
        path = folder / f"{name}.beton"
        if not path.exists():
            try:
                yield from write_beton(path, _decoded_ahead(split), source.image_size, source, name)
            except OSError as error:
                full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
                raise StorageError(f"{path}: {full}; free space or name another folder with --cache-dir") from None


def _decoded_ahead(split: Split) -> Split:
    """The same split, read in a thread of its own, so that decoding and writing share two cores."""

    def stream() -> Iterator[npt.NDArray[np.uint8]]:
        images = split.images()
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(lambda: list(itertools.islice(images, DECODED_AHEAD)))
            while block := ahead.result():
                ahead = pool.submit(lambda: list(itertools.islice(images, DECODED_AHEAD)))
                yield from block

    return Split(split.labels, stream)


def prepare(
    dataset: str, data_dir: Path, cache_dir: Path | None, *, timeout_seconds: float = CONVERSION_SECONDS
) -> Generator[Progress, None, dict[str, Beton]]:
    """The betons of a data set by split, converted first if they are not in the cache; yields progress.

    Any number of processes may call it at once: whoever takes the lock converts, the others wait for the lock and draw
    no conclusion from a missing file. Raises DataError, UsageError, StorageError (an unwritable cache), ProcessError
    if another process holds the lock longer than `timeout_seconds`.
    """
    cache = cache_dir or default_cache()
    place = locate(dataset, data_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache / f"{place.name}-{digest_of(place, cache / f'{place.name}.digest')[:12]}"
        folder.mkdir(exist_ok=True)
        paths = {split: folder / f"{split}.beton" for split in ("train", "test")}
        lock = Lock(folder / "lock")
        deadline = time.monotonic() + timeout_seconds
        # a beton appears whole: if both are there no lock is needed, if one is missing only its holder may say so
        while not all(path.exists() for path in paths.values()) and not lock.acquire():
            if time.monotonic() > deadline:
                raise ProcessError(f"{folder} is being converted by {lock.owner()} for over {timeout_seconds:g} s")
            time.sleep(0.05)
    except OSError as error:
        raise StorageError(f"the cache {cache}: {error.strerror}; name a writable one with --cache-dir") from None
    try:
        if not all(path.exists() for path in paths.values()):
            yield from convert(open_source(place), folder)
        return {split: open_beton(path) for split, path in paths.items()}
    finally:
        lock.release()
