"""The cache: one folder of betons for each data set and each way to convert it, made by the first run that needs it.

digits-0123456789ab/    the name, and a digest of the source and of the settings of the conversion
  train.beton           with train.json, and train.verified once its bytes have been checked
  test.beton            likewise
  lock                  held by the process that converts
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from dtrain.data.beton import FORMAT, RAW_LIMIT, Beton, Block, Progress, open_beton, write_beton
from dtrain.data.pictures import BadPicture, Decode, Pixels, Source, quiet
from dtrain.data.sources import digest_of, locate, open_source
from dtrain.errors import ProcessError, StorageError
from dtrain.files import Lock, canonical_json, remove_partials
from dtrain.settings.data import Conversion

SPLITS = ("train", "test")
BLOCK = 16  # pictures that a thread decodes as one task: more would need more memory, fewer would add overhead
LARGEST_POOL = 8  # threads that decode; the one thread that reads and writes cannot keep more of them busy
NAMED = 5  # the most files that a message lists by name
CONVERSION_SECONDS = 3600.0  # how long a process waits while another one converts


def default_cache() -> Path:
    """The folder of the cache unless the user names one: $XDG_CACHE_HOME/dtrain, or ~/.cache/dtrain."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain"


def prepare(
    dataset: str,
    data_dir: Path,
    cache_dir: Path | None,
    asked: Conversion | None = None,
    *,
    options: Mapping[str, str] | None = None,
    found: Path | None = None,
    timeout_seconds: float = CONVERSION_SECONDS,
    raw_limit: int = RAW_LIMIT,
) -> Generator[Progress, None, dict[str, Beton]]:
    """The betons of a data set by split, converted first if they are not in the cache; yields progress.

    options: of a named data set, as text. found: the folder in which another process of this host has just prepared the
    same data set; its betons are opened at once, without reading the source or hashing the betons again. If it does not
    exist, as where each host has a cache of its own, `found` is ignored.
    Any number of processes may call this at the same time: the one that takes the lock converts, the others wait.
    Raises DataError, UsageError, StorageError (a cache that cannot be written), ProcessError if another process holds
    the lock longer than `timeout_seconds`. Cost: the first call converts. Every call lists the files of a folder; a tar
    and the betons are hashed only if they have changed since the last call.
    """
    if found is not None and all(path.exists() for path in _paths(found).values()):
        return {split: open_beton(path, verify=False) for split, path in _paths(found).items()}
    asked = asked or Conversion()
    cache = cache_dir or default_cache()
    place = locate(dataset, data_dir, options)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        digest = digest_of(place, cache / f"{place.name}.digest")
        folder = cache / f"{place.name}-{_digest(digest, asked)[:12]}"
        folder.mkdir(exist_ok=True)
        paths = _paths(folder)
        lock = Lock(folder / "lock")
        deadline = time.monotonic() + timeout_seconds
        # A beton gets its name only when it is complete, so if both are there, no lock is needed. If one is missing,
        # another process may be about to finish it, so only the holder of the lock may conclude that it has to be made.
        while not all(path.exists() for path in paths.values()) and not lock.acquire():
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"{lock.owner()} has been converting {folder} for over {timeout_seconds:g} s; wait until it has "
                    "finished and run the same command again, or end that process"
                )
            time.sleep(0.05)
    except OSError as error:
        raise StorageError(f"the cache {cache}: {error.strerror}; name a writable one with --cache-dir") from None
    try:
        if not all(path.exists() for path in paths.values()):
            yield from convert(open_source(place, asked, digest), folder, asked.bad_images, raw_limit=raw_limit)
        return {split: open_beton(path) for split, path in paths.items()}
    finally:
        lock.release()


def _paths(folder: Path) -> dict[str, Path]:
    return {split: folder / f"{split}.beton" for split in SPLITS}


def _digest(source_digest: str, asked: Conversion) -> str:
    """The digest of everything that determines the converted bytes.

    With a --store-size that is its value; the image size, at which images are only cropped later, is then left out.
    """
    stored = replace(asked, image_size=asked.stored_size, store_size=None)
    return hashlib.sha256(canonical_json({"format": FORMAT, "source": source_digest, **asdict(stored)})).hexdigest()


def convert(
    source: Source, folder: Path, bad_images: str = "stop", *, raw_limit: int = RAW_LIMIT
) -> Iterator[Progress]:
    """Write every split of a source to `folder`; yields progress. A split that is already there is kept.

    bad_images: "stop" raises BadPicture for the first picture that cannot be decoded; "skip" leaves such pictures out
    and lists them. Raises StorageError, for a full disk too. After an error or Ctrl-C no incomplete beton is left. The
    caller holds the folder's lock.
    """
    remove_partials(folder)
    for name, split in source.splits.items():
        path = folder / f"{name}.beton"
        if path.exists():
            continue
        bad: list[BadPicture] = []
        try:
            with closing(_decoded(split.pictures())) as blocks:
                for step in write_beton(path, _checked(blocks, bad_images, bad), source, name, raw_limit=raw_limit):
                    last = step.done == step.total
                    yield replace(step, told=tuple(_told(source, name, bad))) if last else step
        except OSError as error:
            full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise StorageError(f"{path}: {full}; free space or name another folder with --cache-dir") from None


def _told(source: Source, split: str, bad: list[BadPicture]) -> Iterator[str]:
    if bad:
        names = _some([f"{picture.name} ({picture.reason})" for picture in bad])
        yield f"{source.name}/{split}: {len(bad)} pictures that cannot be decoded are left out: {names}"
    if split == SPLITS[0] and source.passed_by:
        yield f"{source.name}: {len(source.passed_by)} files that are not pictures are ignored: " + _some(
            list(source.passed_by)
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more; `dtrain data inspect` lists them" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _checked(blocks: Iterable[Block], bad_images: str, bad: list[BadPicture]) -> Iterator[Block]:
    """The same blocks. A picture that cannot be decoded is raised, or added to `bad` if such pictures are skipped."""
    for block in blocks:
        for picture in block:
            if isinstance(picture, BadPicture):
                if bad_images == "stop":
                    raise picture
                bad.append(picture)
        yield block


def _decoded(stream: Iterator[Decode]) -> Generator[Block, None, None]:
    """The pictures of a stream in order, in blocks. Threads decode the next blocks while the caller writes one."""
    count = min(len(os.sched_getaffinity(0)), LARGEST_POOL)
    with quiet(), ThreadPoolExecutor(count, "dtrain-decode") as pool:
        ahead: deque[Future[Block]] = deque()
        while block := list(itertools.islice(stream, BLOCK)):
            ahead.append(pool.submit(_decode, block))
            if len(ahead) > count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _decode(block: list[Decode]) -> Block:
    def one(decode: Decode) -> Pixels | BadPicture:
        try:
            return decode()
        except BadPicture as error:
            return error

    return [one(decode) for decode in block]
