"""What this process is computed with: allocator, threads, precision, device. Decided once, printed once.

Importing this file imports nothing heavy, so that `tune_allocator` can run before the first tensor exists.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.config import TrainConfig
from dtrain.errors import UsageError

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def tune_allocator() -> bool:
    """Keep freed memory for the next step instead of giving it to the kernel; True if it was done.

    By default glibc maps every block over 32 MiB afresh and trims its heap, so a step at batch 250 takes 90,000 page
    faults; with these three settings none, 8 to 15 % more images a second, 3 to 6 % more memory. Call it before the
    first tensor. Does nothing off glibc or under a preloaded allocator; DTRAIN_MALLOC=default switches it off.
    """
    if os.environ.get("DTRAIN_MALLOC") == "default" or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return False
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


@dataclass(frozen=True)
class Runtime:
    """What `auto` became. Kept in run.json; a resume keeps it where it can."""

    device: str  # "cpu" or "cuda:<index>"
    backend: str  # "gloo" or "nccl"
    threads: int  # compute threads of this process
    amp_dtype: str  # "float32", "bfloat16" or "float16"
    why: tuple[str, ...]  # one reason for each decision, for people

    def torch_device(self) -> torch.device:
        """The device as torch's type."""
        import torch

        return torch.device(self.device)

    def dtype(self) -> torch.dtype:
        """The autocast type as torch's: float32 means no autocast."""
        import torch

        dtype: torch.dtype = getattr(torch, self.amp_dtype)
        return dtype


def decide(config: TrainConfig, *, local_rank: int, local_world: int, kept: dict[str, object] | None = None) -> Runtime:
    """Resolve every `auto` for this process; imports torch, changes nothing.

    kept: what a resumed run resolved (`threads`, `amp_dtype`); used instead of `auto` where this machine can, so that
    a resume has the same bits. Raises UsageError for a device or precision that is not here.
    """
    import torch

    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    on_cuda = config.device == "cuda" or (config.device == "auto" and cuda)
    if on_cuda and local_world > torch.cuda.device_count():  # on every rank, so that all end with one error
        raise UsageError(
            f"{local_world} processes on this host but {torch.cuda.device_count()} CUDA devices; "
            f"start {torch.cuda.device_count()}, or --device cpu"
        )
    device = f"cuda:{local_rank}" if on_cuda else "cpu"
    backend = ("nccl" if on_cuda else "gloo") if config.backend == "auto" else config.backend
    if backend == "nccl" and not on_cuda:
        raise UsageError("--backend nccl needs --device cuda; use --backend gloo")
    amp, amp_why = _precision(config, on_cuda, (kept or {}).get("amp_dtype"))
    threads, threads_why = _threads(config, local_world, (kept or {}).get("threads"))
    why = (f"device {device}", f"{amp_why}", f"{threads_why}")
    return Runtime(device=device, backend=backend, threads=threads, amp_dtype=amp, why=why)


def _precision(config: TrainConfig, on_cuda: bool, kept: object) -> tuple[str, str]:
    import torch

    chosen, why = (config.amp_dtype, "as asked") if config.amp_dtype != "auto" else (kept, "as this run began")
    if chosen == "float16" and not on_cuda:  # torch has no fast float16 convolutions for most processors
        return "float16", f"float16 {why}; on a CPU it can be a thousand times slower than bfloat16 or float32"
    if isinstance(chosen, str):
        return chosen, f"{chosen} {why}"
    if on_cuda:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "bfloat16: this GPU has it"
        return "float16", "float16 with loss scaling: this GPU has no bfloat16"
    capabilities = torch.cpu.get_capabilities()
    native = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if capabilities.get(name)]
    if native:
        return "bfloat16", f"bfloat16: this processor has {native[0]}"
    return "float32", "float32: this processor has no bfloat16"


def _threads(config: TrainConfig, local_world: int, kept: object) -> tuple[int, str]:
    usable = len(os.sched_getaffinity(0))
    if config.threads:
        return config.threads, f"{config.threads} threads as asked"
    if isinstance(kept, int) and kept <= usable:
        return kept, f"{kept} threads as this run began"
    # not OMP_NUM_THREADS: torchrun sets it to 1 for every worker, however many cores there are
    share = max(1, usable // local_world)
    more = f"; not the {kept} with which this run began, so that it rounds otherwise" if kept else ""
    return share, f"{share} threads = {usable} cores / {local_world} processes{more}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a refusal of memory: Python's, torch's on a CPU, or CUDA's."""
    while error is not None:
        text = str(error).lower()
        refused = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
        if refused or isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Make a refusal of memory inside a UsageError: out of memory `what`, which says when, and what to do."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        line = str(error).splitlines()[0] if str(error) else "no more is known"
        # from None: the one who tells first is the nearest to it
        raise UsageError(f"out of memory {what} ({type(error).__name__}: {line})") from None


def apply(runtime: Runtime, *, deterministic: bool) -> None:
    """Set threads, denormals and deterministic kernels of this process, and its CUDA device."""
    import torch

    torch.set_num_threads(runtime.threads)
    # late in training gradients reach denormals, which some processors compute a hundred times slower
    torch.set_flush_denormal(True)
    if runtime.device.startswith("cuda"):
        torch.cuda.set_device(runtime.device)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True
    if deterministic:
        # else torch fills the memory of every new batch, which takes longer than its making
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module's property
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks of cuBLAS to be deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # also off: a notebook may train twice
        torch.use_deterministic_algorithms(deterministic)
