"""Images out of a beton through FFCV: the only file that imports it.

FFCV maps the file and gathers what our indices name, in a thread of its own. Its order, sharding, random operations and
seeds are not used. Its thread is replaced by one that ends when told to, and hands its error over.
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
    """FFCV sets torch's and numba's thread counts, at import and for every loader; they are ours."""
    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(of_torch)
        numba.set_num_threads(of_numba)


@contextlib.contextmanager
def _no_typed_dict() -> Iterator[None]:
    """FFCV compiles a numba dictionary while it is imported, for seconds, to hold three constants: a dict will do."""
    kept, numba.typed.Dict = numba.typed.Dict, dict
    try:
        yield
    finally:
        numba.typed.Dict = kept


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    """OpenCV, which FFCV imports, sets LD_LIBRARY_PATH and Qt's paths for every process that is started later."""
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


# decoding is the host's work; for CUDA it would make streams on device 0, whichever is this process's own
epoch_iterator.IS_CUDA = False

MAPPED = numba.types.Array(numba.uint8, 1, "C", readonly=True)
STATE = numba.types.Tuple([MAPPED, numba.uint64[::1], numba.uint64[::1]])  # type: ignore[no-untyped-call]  # numba's


def _compiled_reader(self: Any) -> Any:
    """What finds an image's bytes in the mapped file, as FFCV has it, but of a type of its own.

    FFCV makes numba's one and only type of uint8 arrays read-only, in place: every kernel of this process that was
    compiled for that type then fails, as soon as it is compiled for another, with a KeyError.
    """

    def read(address: Any, state: Any) -> Any:
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return Compiler.compile(read, MAPPED(numba.uint64, STATE))


OSCacheManager.state_type = STATE
OSCacheManager.compile_reader = _compiled_reader


@functools.lru_cache(maxsize=4)  # FFCV compiles code for each, for a third of a second, at every jump and evaluation
def _loader(path: str, sha256: str, largest: int) -> Any:
    """FFCV's view of a beton. sha256: so that a file that took the place of another is opened anew."""
    return Loader(
        path,
        batch_size=largest,
        num_workers=1,
        os_cache=True,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        batches_ahead=1,
        seed=0,  # unused; without it FFCV draws one from numpy's global generator, which is the run's
        pipelines={"image": [SimpleRGBImageDecoder()], "label": None},
    )


class _Stream(EpochIterator):  # type: ignore[misc]  # FFCV has no types
    """FFCV's thread, fed by our batches. It stops within a batch when told to and keeps the error it died of."""

    def __init__(self, loader: Any, batches: Iterator[npt.NDArray[np.uint64]]) -> None:
        self._ready = False
        self.error: BaseException | None = None
        super().__init__(loader, np.zeros(0, dtype=np.uint64))
        self.iter_ixes = batches
        self._ready = True
        self.start()

    def start(self) -> None:
        """Begin, but not already in FFCV's constructor, where the batches are not yet ours."""
        if self._ready:
            threading.Thread.start(self)

    def run(self) -> None:
        """Fill slot after slot; then, or on an error, say that nothing more comes."""
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
        """End the thread and wait for it, at most for the batch that it is making."""
        self.terminate_event.set()
        with contextlib.suppress(Empty):  # it may wait for room
            while True:
                self.output_queue.get_nowait()
        self.join()
        self.close()


class FfcvReader:
    """One stream of slots for given batches of sample indices; a slot is valid until the next is asked for."""

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
        """Give the thread back."""
        self._stream.stop()
