"""Betons: files in FFCV's format, one for each split, written and read with numpy alone and checked before each use.

Beside each beton lies a JSON file, the sidecar, with the facts for which the format has no place. FFCV's own writer is
not used: it waits for ever after any error, and does not give the same bytes twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from dtrain.data.format import (
    ALLOCATION,
    BEGIN,
    HEADER,
    JPEG,
    PAGE,
    RAW,
    SAMPLE,
    VERSION,
    checked,
    descriptors,
    map_file,
)
from dtrain.data.pictures import BadPicture, Pixels, Source
from dtrain.errors import DataError
from dtrain.files import canonical_json, sha256_of, whole_file, write_json

FORMAT = 3  # version of the sidecar, and of all else in a conversion that a new version of dtrain may change
RAW_LIMIT = 4 << 30  # bytes; a split whose pixels need more is stored as JPEG, others are stored raw
JPEG_QUALITY = 95
# weights of red, green and blue in the luma of ITU-R BT.601, in units of 2^-16 as in Pillow; they add up to 1, so the
# luma of a gray pixel is its own value
LUMA = (19595, 38470, 7471)
Block = list[Pixels | BadPicture]
STORED = {"raw": RAW, "jpeg": JPEG}
AGAIN = "remove the folder and convert the data set again"
CHANGED = "leave the source as it is while it is converted, and run the command again"


@dataclass(frozen=True)
class Progress:
    """How far the conversion of one split has come, in images. told: messages for the user, each given once."""

    split: str
    done: int
    total: int
    told: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Beton:
    """One converted split.

    image_size: side of the stored pictures in pixels. channels: of the stored pictures. stored: "raw" or "jpeg".
    labels: int64 [N]. pixel_offsets: uint64 [N], where in the file the bytes of each picture begin. mean, std: of this
    split, for each channel, in 0..1; gray_mean, gray_std: those of its luma. gray_images: how many pictures have
    R = G = B everywhere. skipped: name and reason of each picture that could not be decoded. passed_by: names of files
    that are not pictures. sha256: of the file. digest: a hash of all that can change the results of a run: the pixels,
    the labels and these facts. source_digest: the digest of the source that was converted.
    """

    path: Path
    split: str
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    stored: str
    labels: npt.NDArray[np.int64]
    pixel_offsets: npt.NDArray[np.uint64]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gray_mean: float
    gray_std: float
    gray_images: int
    skipped: tuple[tuple[str, str], ...]
    passed_by: tuple[str, ...]
    sha256: str
    digest: str
    source_digest: str


# -- writing ---------------------------------------------------------------------------------------------------------


def write_beton(
    path: Path, blocks: Iterable[Block], source: Source, split_name: str, *, raw_limit: int
) -> Iterator[Progress]:
    """Write one split and its sidecar, completely or not at all; yields progress.

    blocks: the pictures of the split, uint8 [S, S, 3], in the order of its labels; a sample for which there is a
    BadPicture is left out. raw_limit: the most bytes of pixels that are stored raw; larger splits are stored as JPEG.
    The same source gives the same bytes. Holds one page and some 50 bytes a sample in memory. Raises DataError if the
    number or the shape of the pictures is not what the split has announced, or if a class has no picture left; OSError.
    """
    listed, size, where = source.splits[split_name].labels, source.image_size, f"{source.name}/{split_name}"
    mode = RAW if len(listed) * size * size * 3 <= raw_limit else JPEG
    records, table = np.zeros(len(listed), SAMPLE), np.zeros(len(listed), ALLOCATION)
    statistics = _Statistics()
    skipped: list[tuple[str, str]] = []
    kept = done = 0
    with whole_file(path) as part:
        with part.open("wb") as file:
            pages = _Pages(file, BEGIN + records.nbytes, size * size * 3)
            for block in blocks:
                if done + len(block) > len(listed):
                    raise DataError(f"{where}: {len(listed)} images were listed, {done + len(block)} came; {CHANGED}")
                for number, pixels in enumerate(block, done):
                    if isinstance(pixels, BadPicture):
                        skipped.append((pixels.name, pixels.reason))
                        continue
                    if pixels.shape != (size, size, 3):
                        raise DataError(f"an image of shape {pixels.shape} came where {size}x{size} RGB was promised")
                    data = pixels.tobytes() if mode == RAW else _jpeg(pixels)
                    records[kept] = ((mode, size, size, pages.add(data)), listed[number])
                    table[kept] = (kept, records[kept]["image"]["position"], len(data))
                    kept += 1
                statistics.add([pixels for pixels in block if not isinstance(pixels, BadPicture)])
                done += len(block)
                yield Progress(split_name, done, len(listed))
            if done != len(listed):
                raise DataError(f"{where}: {len(listed)} images were listed, {done} came; {CHANGED}")
            records, table = records[:kept], table[:kept]
            _check_classes(source, split_name, listed, records["label"])
            end = pages.finish()
            file.write(table.tobytes())
            file.seek(0)
            file.write(np.array([(VERSION, 2, pages.size, kept, end)], HEADER).tobytes())
            file.write(descriptors().tobytes())
            file.write(records.tobytes())
        facts = {
            "format": FORMAT,
            "split": split_name,
            "images": kept,
            "image_size": size,
            "channels": 3,
            "stored": next(name for name, number in STORED.items() if number == mode),
            "class_names": list(source.class_names),
            **statistics.facts(),
            "skipped": skipped,
            "passed_by": list(source.passed_by),
            "sha256": sha256_of(part),
        }
        # written before the beton gets its name: a beton without a sidecar must not exist, the opposite does no harm
        write_json(path.with_suffix(".json"), {**facts, "digest": _digest(facts), "source_digest": source.digest})


def _check_classes(source: Source, split_name: str, listed: Any, labels: Any) -> None:
    if lost := sorted(set(np.unique(listed).tolist()) - set(np.unique(labels).tolist())):
        where, name = f"{source.name}/{split_name}", source.class_names[lost[0]]
        raise DataError(f"{where}: no picture of class {name!r} can be decoded; replace or remove it")


def _digest(facts: dict[str, Any]) -> str:
    """The digest of the facts that can change the results of a run; files that are not pictures cannot."""
    beside = ("digest", "source_digest", "passed_by")
    return hashlib.sha256(canonical_json({k: v for k, v in facts.items() if k not in beside})).hexdigest()


def _jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=JPEG_QUALITY)
    return file.getvalue()


class _Pages:
    """Writes the pages of a file. Their size is a power of two, as FFCV demands; no image is split over two pages."""

    def __init__(self, file: BinaryIO, head: int, largest: int) -> None:
        self.size = max(PAGE, 1 << (largest - 1).bit_length())
        self._file, self._begin = file, -(-head // PAGE) * PAGE
        self._page = bytearray()
        file.seek(self._begin)  # what comes before is written last, when the content of the file is known

    def add(self, data: bytes) -> int:
        """Add the bytes of an image; returns where in the file they will lie. Raises DataError if they are too many."""
        if len(self._page) + len(data) > self.size:
            self.finish()
        if len(data) > self.size:
            raise DataError(f"an image takes {len(data)} bytes, more than a page of {self.size}; make it smaller")
        at = self._begin + len(self._page)
        self._page += data
        return at

    def finish(self) -> int:
        """Write the last, unfinished page; returns where in the file the pages end."""
        if self._page:
            self._file.write(self._page.ljust(self.size, b"\0"))
            self._begin += self.size
            self._page.clear()
        return self._begin


class _Statistics:
    """Counts how often each value of red, green, blue and luma occurs. Exact, whatever the order of the images."""

    def __init__(self) -> None:
        self.counts = np.zeros((4, 256), np.int64)
        self.gray_images = 0

    def add(self, block: list[Pixels]) -> None:
        if not block:
            return
        colours = np.stack(block)
        luma = (colours @ np.array(LUMA) + 32768) >> 16
        for count, values in zip(self.counts, (*np.moveaxis(colours, 3, 0), luma), strict=True):
            count += np.bincount(values.ravel(), minlength=256)
        self.gray_images += int((colours == colours[..., :1]).all((1, 2, 3)).sum())

    def facts(self) -> dict[str, Any]:
        """Means and standard deviations in 0..1; a deviation is at least 1e-6, so that one can divide by it."""
        values = np.arange(256)
        pixels = self.counts[0].sum()
        mean = self.counts @ values / pixels / 255
        std = np.sqrt(np.maximum(self.counts @ values**2 / pixels / 255**2 - mean**2, 1e-12))
        return {
            "mean": mean[:3].tolist(),
            "std": std[:3].tolist(),
            "gray_mean": float(mean[3]),
            "gray_std": float(std[3]),
            "gray_images": self.gray_images,
        }


# -- reading ---------------------------------------------------------------------------------------------------------


def open_beton(path: Path, *, verify: bool = True) -> Beton:
    """Check the structure of a beton and return what it holds.

    verify: also hash its bytes, on the first use after the file has changed; False where another process of this host
    has just done so. Raises DataError with the reason.
    """
    facts = _sidecar(path)
    content = checked(path, AGAIN)
    size, stored = facts["image_size"], facts["stored"]

    def refuse(reason: str) -> DataError:
        return DataError(f"{path}: {reason}; {AGAIN}")

    if map_file(path)[HEADER.itemsize : BEGIN].tobytes() != descriptors().tobytes():
        raise refuse("its fields are not one image and one label")
    if len(content.labels) != facts["images"]:
        raise refuse(f"holds {len(content.labels)} samples, its sidecar says {facts['images']}")
    image = content.image
    if (image["width"] != size).any() or (image["height"] != size).any() or (image["mode"] != STORED[stored]).any():
        raise refuse(f"holds an image that is not {stored} {size}x{size}")
    classes = len(facts["class_names"])
    if (content.labels < 0).any() or (content.labels >= classes).any():
        raise refuse(f"holds a label outside 0..{classes - 1}")
    told = {name: facts[name] for name in _FACTS}
    for name in ("class_names", "mean", "std", "passed_by"):
        told[name] = tuple(told[name])
    told["skipped"] = tuple((name, reason) for name, reason in told["skipped"])
    beton = Beton(path=path, labels=content.labels, pixel_offsets=content.positions, **told)
    if verify:
        _verify_once(beton)
    return beton


_FACTS = [f.name for f in dataclasses.fields(Beton) if f.name not in ("path", "labels", "pixel_offsets")]


def _sidecar(path: Path) -> dict[str, Any]:
    sidecar = path.with_suffix(".json")
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        if facts["format"] == FORMAT and facts["digest"] == _digest(facts) and "source_digest" in facts:
            return dict(facts)
        reason = "its facts are not those that were written"
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DataError(f"{sidecar}: {reason}; {AGAIN}")


def verify_beton(path: Path) -> Beton:
    """Check the structure and every byte of a beton; returns it. Reads the whole file. Raises DataError."""
    beton = open_beton(path, verify=False)
    _verify(beton)
    return beton


def _verify(beton: Beton) -> None:
    if sha256_of(beton.path) != beton.sha256:
        raise DataError(f"{beton.path}: its bytes are not those that were written; {AGAIN}")


def _verify_once(beton: Beton) -> None:
    """Check every byte if the file's size or time has changed since the last check, which a file beside it records."""
    stat = beton.path.stat()
    memo = beton.path.with_suffix(".verified")
    known = f"{stat.st_size} {stat.st_mtime_ns} {beton.sha256}"
    with contextlib.suppress(OSError):
        if memo.read_text(encoding="ascii") == known:
            return
    _verify(beton)
    with contextlib.suppress(OSError):  # in a cache that cannot be written, betons are checked again by each run
        memo.write_text(known, encoding="ascii")
