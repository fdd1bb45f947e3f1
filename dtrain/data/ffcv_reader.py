"""The reader that uses FFCV; this is the only file that imports FFCV.

FFCV maps the file into memory, and copies or decodes the images of the indices that we give it, in a thread of its own.
Its sample order, sharding, random operations and seeds are not used. Its thread class is replaced by a subclass that
ends when it is told to, and that hands its error over to the caller.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterable, Iterator
from queue import Empty, Full
from typing import Any

import numba
import numba.typed
import numpy as np
import numpy.typing as npt
import torch

from dtrain.data.batch import Slot
from dtrain.data.beton import Beton

POLL_SECONDS = 0.05


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """Restore the thread counts of torch and numba, which FFCV changes when it is imported and for every loader."""
    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(of_torch)
        numba.set_num_threads(of_numba)


@contextlib.contextmanager
def _no_typed_dict() -> Iterator[None]:
    """Let FFCV keep three constants in a plain dict at its import; compiling its numba dictionary takes seconds."""
    kept, numba.typed.Dict = numba.typed.Dict, dict
    try:
        yield
    finally:
        numba.typed.Dict = kept


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the environment: OpenCV, which FFCV imports, sets LD_LIBRARY_PATH and the paths of Qt in it."""
    kept = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(kept)


with _threads_kept(), _environment_kept(), _no_typed_dict():
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption, epoch_iterator
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.pipeline.compiler import Compiler


# FFCV only decodes here, on the CPU. Without this line it would create CUDA streams on GPU 0, which another process may
# own.
epoch_iterator.IS_CUDA = False

MAPPED = numba.types.Array(numba.uint8, 1, "C", readonly=True)
STATE = numba.types.Tuple([MAPPED, numba.uint64[::1], numba.uint64[::1]])  # type: ignore[no-untyped-call]  # numba's


def _compiled_reader(self: Any) -> Any:
    """A copy of FFCV's function that finds an image's bytes in the mapped file, but with an array type of its own.

    FFCV's version marks numba's one shared type of uint8 arrays as read-only. Every kernel of this process that has
    been compiled for that type then fails with a KeyError as soon as it is compiled for another type.
    """

    def read(address: Any, state: Any) -> Any:
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return Compiler.compile(read, MAPPED(numba.uint64, STATE))


OSCacheManager.state_type = STATE
OSCacheManager.compile_reader = _compiled_reader


# cached, since FFCV compiles code for each new loader for a third of a second, and a loader is needed for each
# evaluation and whenever training jumps to another step
@functools.lru_cache(maxsize=4)
def _loader(path: str, sha256: str, largest: int) -> Any:
    """FFCV's loader of a beton. sha256: only a part of the cache's key, so that a replaced file is opened anew."""
    return Loader(
        path,
        batch_size=largest,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        batches_ahead=1,
        seed=0,  # unused; without it FFCV would draw one from numpy's global generator, which belongs to the network
        pipelines={"image": [SimpleRGBImageDecoder()], "label": None},
    )


class _Stream(EpochIterator):  # type: ignore[misc]  # FFCV has no types
    """FFCV's thread, which is given our batches of indices.

    After `stop` it finishes at most the batch that it is making. An exception in it is kept in `error`.
    """

    def __init__(self, loader: Any, batches: Iterator[npt.NDArray[np.uint64]]) -> None:
        self._ready = False
        self.error: BaseException | None = None
        super().__init__(loader, np.zeros(0, dtype=np.uint64))
        self.iter_ixes = batches
        self._ready = True
        self.start()

    def start(self) -> None:
        """Start the thread; does nothing while FFCV's constructor runs, since our batches are set only after it."""
        if self._ready:
            threading.Thread.start(self)

    def run(self) -> None:
        """Fill one slot after the other; at the end, or after an error, put None in the queue."""
        try:
            for number, indices in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                if not self._put(self.run_pipeline(number, indices, slot, None)[0]):
                    return
        except BaseException as error:
            self.error = error
        self._put(None)

    def _put(self, item: Any) -> bool:
        while not self.terminate_event.is_set():
            with contextlib.suppress(Full):
                self.output_queue.put(item, timeout=POLL_SECONDS)
                return True
        return False

    def stop(self) -> None:
        """End the thread and wait until it has ended, at most for the batch that it is making."""
        self.terminate_event.set()
        with contextlib.suppress(Empty):  # the thread may be waiting for room in the queue
            while True:
                self.output_queue.get_nowait()
        self.join()
        self.close()


class FfcvReader:
    """A `Reader` that uses FFCV, for betons stored raw or as JPEG. A slot holds copies of the images of one batch."""

    def __init__(self, beton: Beton, batches: Iterable[npt.NDArray[np.int64]], largest: int) -> None:
        with _threads_kept():
            loader = _loader(str(beton.path), beton.sha256, largest)
            self._stream = _Stream(loader, (np.ascontiguousarray(indices, dtype=np.uint64) for indices in batches))
        self._bytes = beton.image_size**2 * beton.channels

    def __iter__(self) -> Iterator[Slot]:
        while (images := self._stream.output_queue.get()) is not None:
            yield images.reshape(-1), np.arange(len(images), dtype=np.uint64) * np.uint64(self._bytes)
        if self._stream.error is not None:
            raise self._stream.error

    def close(self) -> None:
        """End the thread."""
        self._stream.stop()
