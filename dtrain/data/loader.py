"""The loader: a thread makes batches ahead of time, from the stored bytes that a reader gives and the augmentation.

The batch of a step is a function of that step alone, and not of the batches before it. The thread goes through the
steps in order; where another step is requested, a new thread starts there. So a loader has no state for a checkpoint.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dtrain.data.augment import Decisions, decide, mixed_labels, undecided
from dtrain.data.batch import Batch, Reader, Request
from dtrain.data.beton import LUMA, Beton
from dtrain.data.memory_reader import MemoryReader
from dtrain.data.pixels import lookup_table, write_images
from dtrain.errors import DataError, UsageError
from dtrain.keyed import Stream, key
from dtrain.settings.augmentation import Augmentation

AHEAD = 2  # batches that are kept ready: one while the next is being made, one in reserve for when that takes longer
POLL_SECONDS = 0.05


OpenReader = Callable[[Beton, Iterator[npt.NDArray[np.int64]], int], Reader]  # file, sample numbers, largest batch


class Loader:
    """The batches of a run by step; made by `open_loader`, which explains the arguments.

    Use it from one thread, and close it after use, for instance by a `with` block. told: the name of the reader, for
    the console, with the reason if it is not the first choice. wait_seconds: how long `batch` has waited so far.
    """

    def __init__(
        self,
        beton: Beton,
        request_at: Callable[[int], Request | None],
        *,
        reader: OpenReader,
        told: str,
        image_size: int,
        channels: int,
        augmentation: Augmentation | None,
        seed: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype,
        device: torch.device,
        channels_last: bool,
        kernel_threads: int,
        largest: int,
    ) -> None:
        self._open_reader, self.told = reader, told
        self.wait_seconds = 0.0
        self._beton, self._request_at, self._augmentation, self._seed = beton, request_at, augmentation, seed
        self._size, self._channels, self._mean, self._std = image_size, channels, mean, std
        self._lut = lookup_table(mean, std, str(dtype).removeprefix("torch."))
        self._dtype, self._device, self._channels_last, self._largest = dtype, device, channels_last, largest
        self._pool = ThreadPoolExecutor(kernel_threads, "dtrain-kernel") if kernel_threads > 1 else None
        self._parts = kernel_threads
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # torch's
        self._ahead: _Ahead | None = None

    def batch(self, step: int) -> Batch:
        """The batch of `step`. Batches of consecutive steps are made ahead of time; any other step restarts the reader.

        Raises IndexError if there is no such step, and any error of the reader. On CUDA the batch is copied to the
        device on a stream of its own, for which the current stream waits; the host does not wait for the copy.
        """
        started = time.perf_counter()
        if self._ahead is None or self._ahead.next_step != step:
            self._stop()
            self._ahead = _Ahead(self, step)
        made = self._ahead.take()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(made, Batch):
            if made.copied is not None:  # waits for this copy alone; waiting for its stream would include later copies
                current = torch.cuda.current_stream(self._device)
                current.wait_event(made.copied)
                for tensor in (made.images, made.labels, made.checksum):
                    tensor.record_stream(current)
            return made
        self._stop()
        if made is None:
            raise IndexError(f"there is no batch {step}")
        raise made

    def start(self, step: int) -> None:
        """Open the reader, compile the kernels, and wait until the batch of `step`, or its error, is ready."""
        self._stop()
        self._ahead = _Ahead(self, step)
        self._ahead.wait()

    def pixels(self, batch: Batch) -> npt.NDArray[np.uint8]:
        """The pixels of a batch without its normalisation, uint8 [b, H, W, C], for people to look at.

        Rectangles of cutout and erasing have the mean colour. Copies the images to the host.
        """
        images_NHWC = batch.images.float().permute(0, 2, 3, 1).cpu().numpy()
        values = (images_NHWC * np.array(self._std) + np.array(self._mean)) * 255
        pixels: npt.NDArray[np.uint8] = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return pixels

    def use_device(self) -> None:
        """Make this loader's GPU the calling thread's current device; otherwise CUDA also uses 0.5 GB on GPU 0."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Make the batches from `step` on in the calling thread, until `request_at` returns None."""
        wanted: list[Request] = []  # whose indices the reader has taken already, but whose batches are not made yet
        count = len(self._beton.labels)

        def indices() -> Iterator[npt.NDArray[np.int64]]:
            at = step
            while (request := self._request_at(at)) is not None:
                # checked here for all readers: with a wrong index FFCV accesses memory that is not its own, and numpy
                # takes -1 for the last sample
                if len(request.indices) > self._largest:
                    raise DataError(f"{self._beton.path}: {len(request.indices)} samples in a batch of {self._largest}")
                if len(request.indices) and not 0 <= request.indices.min() <= request.indices.max() < count:
                    raise DataError(f"{self._beton.path}: a sample outside of its {count} was asked for")
                if request.image_size is not None and not 1 <= request.image_size <= self._size:
                    raise UsageError(
                        f"--image-size {request.image_size}: images of {self._size} pixels can be shrunk to a size in "
                        f"1..{self._size}; give one of these"
                    )
                wanted.append(request)
                yield request.indices
                at += 1

        reader = self._open_reader(self._beton, indices(), self._largest)
        try:
            for flat, offsets in reader:
                yield self._make(flat, offsets, wanted.pop(0))
        finally:
            reader.close()

    def _make(self, flat: npt.NDArray[np.uint8], offsets: npt.NDArray[np.uint64], request: Request) -> Batch:
        size, small, count = self._size, request.image_size or self._size, len(request.indices)
        side, depth = self._beton.image_size, self._beton.channels
        if self._augmentation is not None and request.epoch is not None:
            decisions = decide(self._augmentation, self._seed, request.epoch, request.indices, size, side)
        else:
            decisions = undecided(count, size, side)
        pin = self._copies is not None
        # numba has no float16 and bfloat16: for these types the kernel writes their bits, as uint16, from its table
        carrier = torch.float32 if self._dtype == torch.float32 else torch.uint16
        images_NHWC = torch.empty((count, small, small, self._channels), dtype=carrier, pin_memory=pin)
        out = images_NHWC.numpy()

        def part(number: int) -> None:
            # the batch is cut between pairs, so that partners (see augment.py) stay together
            first, end = (at * count // self._parts // 2 * 2 for at in (number, number + 1))
            cut = slice(first, end if number + 1 < self._parts else count)
            write_images(flat, offsets[cut], side, depth, decisions.of(cut), self._lut, out[cut], size=size)

        if self._pool is None:
            part(0)
        else:
            list(self._pool.map(part, range(self._parts)))
        images = images_NHWC.view(self._dtype).permute(0, 3, 1, 2)
        labels = torch.from_numpy(self._labels(request.indices, decisions))
        indices = torch.from_numpy(request.indices.copy())
        decided = key(0, Stream.CHECKSUM, request.epoch or 0, request.indices, *decisions.columns())
        checksum = torch.tensor(int((decided >> np.uint64(32)).sum()))
        if self._copies is None:
            return Batch(self._laid_out(images), labels, indices, checksum)
        with torch.cuda.stream(self._copies):
            return Batch(
                self._laid_out(images.to(self._device, non_blocking=True)),
                labels.pin_memory().to(self._device, non_blocking=True),
                indices,
                checksum.pin_memory().to(self._device, non_blocking=True),
                self._copies.record_event(),  # evaluated last, so the event comes after the copies
            )

    def _laid_out(self, images: Tensor) -> Tensor:
        return images if self._channels_last else images.contiguous()

    def _labels(self, indices: npt.NDArray[np.int64], decisions: Decisions) -> npt.NDArray[Any]:
        labels = self._beton.labels[indices]
        if (mixtures := decisions.tables.get("mix")) is None:
            return labels
        return mixed_labels(labels, mixtures, len(self._beton.class_names))

    def _stop(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def close(self) -> None:
        """End every thread of the loader. May be called more than once."""
        self._stop()
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Ahead:
    """A thread that makes batches in order and keeps AHEAD of them ready.

    `take` returns the next batch; after the last one it returns None, and after an error in the thread that error.
    """

    def __init__(self, loader: Loader, step: int) -> None:
        self.next_step = step
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(loader, step), name="dtrain-loader", daemon=True)
        self._thread.start()

    def _run(self, loader: Loader, step: int) -> None:
        batches = loader.batches_from(step)
        try:
            loader.use_device()
            for batch in batches:
                if not self._put(batch):
                    return
            self._put(None)
        except Exception as error:
            self._put(error)
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator; this closes the reader, which ends its thread

    def _put(self, item: Batch | Exception | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def wait(self) -> None:
        while self._ready.empty():
            time.sleep(POLL_SECONDS / 10)

    def take(self) -> Batch | Exception | None:
        self.next_step += 1
        return self._ready.get()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def _chosen(kind: str) -> tuple[OpenReader, str]:
    """The reader that auto, ffcv or memory stands for on this machine, and its name for the console.

    Imports FFCV to see if that works.
    """
    if kind == "memory" or (kind == "auto" and importlib.util.find_spec("ffcv") is None):
        return MemoryReader, "memory"
    try:
        from dtrain.data.ffcv_reader import FfcvReader
    except (ImportError, OSError) as error:  # FFCV, or a library that it needs, is not installed
        if kind == "ffcv":
            raise UsageError(
                f"--loader ffcv: FFCV cannot be imported ({error}); pip install 'dtrain[ffcv]', or use --loader memory"
            ) from error
        return MemoryReader, f"memory (FFCV cannot be imported: {error})"
    return FfcvReader, "ffcv"


def open_loader(
    beton: Beton,
    request_at: Callable[[int], Request | None],
    *,
    kind: str,
    image_size: int,
    channels: int,
    augmentation: Augmentation | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
    largest: int,
    seed: int = 0,
    channels_last: bool = True,
    kernel_threads: int = 1,
) -> Loader:
    """A loader of batches made of the images in `beton`; `request_at` says for each step which ones.

    request_at: returns None past the last step; it is called in the loader's thread. kind: auto (ffcv if it can be
    imported, else memory), ffcv or memory; all give equal bytes. image_size, channels: of the output. Larger stored
    pictures are cropped, at a random place if there is augmentation, else in the middle. One channel made from three is
    the luma. augmentation, seed: for requests with an epoch. mean, std: in 0..1, one number, or one for each channel of
    the output or of the stored pictures. dtype, device: of the images. largest: the most images in any request.
    channels_last: memory layout of the images; if False they are contiguous. kernel_threads: number of threads for the
    augmentation kernels; the bytes do not depend on it. The kernels are compiled for the first batch, and then cached
    on disk.
    Raises UsageError for ffcv if it cannot be imported, for a beton of JPEGs without FFCV, and for an image size or
    number of channels that is not stored.
    """
    reader, told = _chosen(kind)
    if reader is MemoryReader and beton.stored != "raw":
        raise UsageError(
            f"{beton.path} is so large that it is stored as JPEG, which FFCV alone reads: pip install 'dtrain[ffcv]', "
            "leave out --loader memory, or give a smaller --image-size or --store-size"
        )
    if image_size > beton.image_size or channels not in (1, beton.channels):
        raise UsageError(
            f"{beton.path} stores {beton.image_size} x {beton.image_size} pixels in {beton.channels} channels; "
            f"{image_size} x {image_size} in {channels} cannot be cut out of it"
        )
    return Loader(
        beton,
        request_at,
        reader=reader,
        told=told,
        image_size=image_size,
        channels=channels,
        augmentation=augmentation,
        seed=seed,
        mean=_per_channel(mean, channels),
        std=_per_channel(std, channels),
        dtype=dtype,
        device=device,
        channels_last=channels_last,
        kernel_threads=kernel_threads,
        largest=largest,
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number for each channel of the output, from `values`: one for all channels, or one for each stored channel.

    For gray, the numbers of the three colours are averaged with the weights of the luma. That is exact for the mean,
    and for the deviation where the three colours vary together: exactly so in gray images, nearly so in photographs.
    """
    if channels == 1 < len(values):
        return (sum(weight * value for weight, value in zip(LUMA, values, strict=True)) / 65536,)
    return values * channels if len(values) == 1 else values
