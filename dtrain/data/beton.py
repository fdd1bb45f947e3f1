"""Betons: FFCV's files, written and read with numpy alone. One file a split, checked before each use.

Beside each stands a sidecar JSON with what the format has no place for. FFCV's own writer hangs on any error and does
not give the same bytes twice.
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

FORMAT = 3  # of the sidecar, and of everything else in a conversion that a new version of dtrain may change
RAW_LIMIT = 4 << 30  # bytes of a split that are stored raw; a larger one is stored as JPEG
JPEG_QUALITY = 95
# ITU-R BT.601's luma of red, green and blue, in units of 2^-16 as Pillow has them; of R = G = B it is R
LUMA = (19595, 38470, 7471)
Block = list[Pixels | BadPicture]
STORED = {"raw": RAW, "jpeg": JPEG}
AGAIN = "remove the folder and convert the data set again"


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: images done of total, of one split; told: lines for people, once."""

    split: str
    done: int
    total: int
    told: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Beton:
    """One split, converted. labels: int64 [N]; pixel_offsets: uint64 [N], where each image's bytes begin in the file.

    stored: "raw" or "jpeg". mean, std: per channel in 0..1, of this split; gray_mean, gray_std: of its luma.
    gray_images: how many have R = G = B everywhere. skipped: name and reason of what could not be decoded. digest: of
    all that shapes numbers, of pixels, labels and these facts.
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
    """Write one split, whole or not at all, with its sidecar; yields progress.

    blocks: its pictures, uint8 [S, S, 3], in the labels' order; those that could not be decoded are left out. Streams:
    one page in memory, and 24 bytes a sample. The same source gives the same bytes. Raises DataError for a stream that
    is not what the split promised, and for a class that has no picture left.
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
                    raise DataError(f"{where}: {len(listed)} images were listed, {done + len(block)} came")
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
                raise DataError(f"{where}: {len(listed)} images were listed, {done} came")
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
        # before the beton: a beton without sidecar must not be, a sidecar without beton does no harm
        write_json(path.with_suffix(".json"), {**facts, "digest": _digest(facts), "source_digest": source.digest})


def _check_classes(source: Source, split_name: str, listed: Any, labels: Any) -> None:
    if lost := sorted(set(np.unique(listed).tolist()) - set(np.unique(labels).tolist())):
        where, name = f"{source.name}/{split_name}", source.class_names[lost[0]]
        raise DataError(f"{where}: no picture of class {name!r} can be decoded; replace or remove it")


def _digest(facts: dict[str, Any]) -> str:
    """Of what shapes numbers. A file that is no picture may come and go beside them."""
    beside = ("digest", "source_digest", "passed_by")
    return hashlib.sha256(canonical_json({k: v for k, v in facts.items() if k not in beside})).hexdigest()


def _jpeg(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=JPEG_QUALITY)
    return file.getvalue()


class _Pages:
    """The pages of a file: of a power of two in bytes, as FFCV wants; what is added lies in one of them."""

    def __init__(self, file: BinaryIO, head: int, largest: int) -> None:
        self.size = max(PAGE, 1 << (largest - 1).bit_length())
        self._file, self._begin = file, -(-head // PAGE) * PAGE
        self._page = bytearray()
        file.seek(self._begin)  # the head is written last, when it is known what is in the file

    def add(self, data: bytes) -> int:
        """Where in the file `data` will lie."""
        if len(self._page) + len(data) > self.size:
            self.finish()
        if len(data) > self.size:
            raise DataError(f"an image takes {len(data)} bytes, more than a page of {self.size}; make it smaller")
        at = self._begin + len(self._page)
        self._page += data
        return at

    def finish(self) -> int:
        """Write what is left; returns where the pages end."""
        if self._page:
            self._file.write(self._page.ljust(self.size, b"\0"))
            self._begin += self.size
            self._page.clear()
        return self._begin


class _Statistics:
    """How often each value occurs in red, green, blue and luma: exact, whatever the order or number of images."""

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
        """Means and deviations in 0..1, that of a channel that never changes being one to divide by."""
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
    """Structure and every byte of a beton. Raises DataError. Reads the whole file."""
    beton = open_beton(path)
    _verify(beton)
    return beton


def _verify(beton: Beton) -> None:
    if sha256_of(beton.path) != beton.sha256:
        raise DataError(f"{beton.path}: its bytes are not those that were written; {AGAIN}")


def _verify_once(beton: Beton) -> None:
    """Read every byte on the first use after a change of size or time, and remember that in a file beside it."""
    stat = beton.path.stat()
    memo = beton.path.with_suffix(".verified")
    known = f"{stat.st_size} {stat.st_mtime_ns} {beton.sha256}"
    with contextlib.suppress(OSError):
        if memo.read_text(encoding="ascii") == known:
            return
    _verify(beton)
    with contextlib.suppress(OSError):  # a cache that cannot be written is verified again next time
        memo.write_text(known, encoding="ascii")
