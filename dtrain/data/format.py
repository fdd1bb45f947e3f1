"""The file format of FFCV 1.0.2 (format version 2) as numpy types, and the check of every file before it is used.

A file consists of the header; a descriptor for each field; a record for each sample (its label, and the mode, width,
height and position of its pixels); pages that hold pixels or JPEG files; and the table of allocations. The check is
needed because a damaged file makes FFCV itself crash, wait for ever or return wrong pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.errors import DataError

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("position", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("position", "<u8"), ("size", "<u8")])
VERSION, INT_FIELD, IMAGE_FIELD = 2, 1, 2
JPEG, RAW = 0, 1  # modes in which an image is stored
PAGE = 2 << 20  # bytes; the smallest page that FFCV allows, so that the files of small data sets stay small
BEGIN = HEADER.itemsize + 2 * FIELD.itemsize  # where in the file the records begin

Flat = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Content:
    """What a file holds, by sample.

    labels: int64 [N]. positions, sizes: uint64 [N], where the pixels or the JPEG file of each sample begin, and their
    length, in bytes. image: the records of the images, [N] IMAGE.
    """

    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.uint64]
    image: npt.NDArray[Any]


def descriptors(names: tuple[str, ...] = ("image", "label"), types: tuple[int, ...] = (IMAGE_FIELD, INT_FIELD)) -> Any:
    """The descriptors of a file's two fields, [2] FIELD."""
    fields = np.zeros(2, FIELD)
    for field, number, name in zip(fields, types, names, strict=True):
        field["type"] = number
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return fields


def content_of(flat: Flat) -> Content:
    """The content of a file that has one image and one label a sample, in either order and under any names.

    flat: the bytes of the file. Raises ValueError with the reason if the file is incomplete or contradicts itself.
    Reads the records and the tables, not the pixels.
    """
    if len(flat) < BEGIN:
        raise ValueError("too short to be a beton")
    head = flat[: HEADER.itemsize].view(HEADER)[0]
    if head["version"] != VERSION or head["fields"] != 2:
        raise ValueError("not a beton of this version")
    types = flat[HEADER.itemsize : BEGIN].view(FIELD)["type"].tolist()
    if sorted(types) != [INT_FIELD, IMAGE_FIELD]:
        raise ValueError("its fields are not one image and one label")
    order = ("image", "label") if types[0] == IMAGE_FIELD else ("label", "image")
    record = np.dtype([(name, SAMPLE[name]) for name in order], align=True)
    count, table_at = int(head["samples"]), int(head["table"])
    first = BEGIN + count * record.itemsize
    if table_at < first or table_at + count * ALLOCATION.itemsize != len(flat):
        raise ValueError("unfinished or cut short")
    records = flat[BEGIN:first].view(record)
    table = flat[table_at:].view(ALLOCATION)
    # sorted, since parallel writers append to the table in the order in which they finish
    table = table[np.argsort(table["sample"], kind="stable")]
    image = records["image"]
    if (table["sample"] != np.arange(count)).any() or (table["position"] != image["position"]).any():
        raise ValueError("its table of samples is damaged")
    if (table["size"] > table_at).any() or (table["position"] > table_at - table["size"]).any():
        raise ValueError("a sample's pixels lie outside of the file")
    if (table["position"] < first).any():
        raise ValueError("a sample's pixels lie outside of the file")
    apart = np.sort(table["position"])[1:] >= np.sort(table["position"] + table["size"])[:-1]
    raw = image["mode"] == RAW
    pixels = image["width"].astype(np.uint64) * image["height"] * np.uint64(3)
    if not apart.all() or (raw & (table["size"] != pixels)).any() or (table["size"] == 0).any():
        raise ValueError("its table of samples is damaged")
    if (image["mode"] > RAW).any():
        raise ValueError("holds an image that is neither raw nor JPEG")
    return Content(records["label"].astype(np.int64), table["position"].copy(), table["size"].copy(), image.copy())


def map_file(path: Path) -> Flat:
    """The bytes of a file, mapped into memory (an empty array for an empty file, which cannot be mapped).

    Raises OSError.
    """
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)


def checked(path: Path, todo: str) -> Content:
    """The content of a file; see `content_of`. Raises DataError with the reason, and `todo` as what the user can do."""
    try:
        return content_of(map_file(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {todo}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; {todo}") from None
