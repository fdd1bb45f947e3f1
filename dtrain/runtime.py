"""The runtime settings of this process: allocator, threads, precision, device. They are decided and printed once.

Importing this file imports nothing heavy, so that `tune_allocator` can run before the first tensor exists.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.errors import UsageError
from dtrain.settings.machine import Machine

if TYPE_CHECKING:
    import torch

# parts of the out-of-memory messages of torch, CUDA, cuDNN and cuBLAS, in lower case
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "status_alloc_failed", "not enough memory")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h


def tune_allocator() -> bool:
    """Keep freed memory for the next step instead of returning it to the kernel. True if the settings were made.

    By default glibc maps every block over 32 MiB afresh and trims its heap, so a step at batch 250 takes 90,000 page
    faults. With these three settings it takes none, processes 8 to 15 % more images a second, and uses 3 to 6 % more
    memory. Call this before the first tensor is created. It does nothing without glibc or with a preloaded allocator,
    and DTRAIN_MALLOC=default switches it off.
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
    """The values that `auto` resolved to. They are stored in run.json, and a resume reuses them where it can."""

    device: str  # "cpu" or "cuda:<index>"
    backend: str  # "gloo" or "nccl"
    threads: int  # compute threads of this process
    amp_dtype: str  # "float32", "bfloat16" or "float16"
    deterministic: bool  # deterministic kernels only
    tf32: bool  # whether float32 products on CUDA may be computed in TensorFloat-32
    autotune: bool  # whether cuDNN times its kernels and takes the fastest
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


def decide(
    settings: Machine, *, local_rank: int, local_world: int, kept: Mapping[str, object] | None = None
) -> Runtime:
    """Resolve every `auto` for this process; imports torch, changes nothing.

    local_rank, local_world: this process among those of its host. kept: the values of a resumed run (`threads`,
    `amp_dtype`), used instead of `auto` where this machine can, so that a resume is bitwise identical. Raises
    UsageError for a device or backend that cannot be used here.
    """
    import torch

    kept = kept or {}
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    on_cuda = settings.device == "cuda" or (settings.device == "auto" and cuda)
    if on_cuda and local_world > torch.cuda.device_count():  # on every rank, so that all end with one error
        raise UsageError(
            f"{local_world} processes on this host but {torch.cuda.device_count()} CUDA devices; "
            f"start {torch.cuda.device_count()}, or --device cpu"
        )
    device = f"cuda:{local_rank}" if on_cuda else "cpu"
    backend = ("nccl" if on_cuda else "gloo") if settings.backend == "auto" else settings.backend
    if backend == "nccl" and not on_cuda:
        raise UsageError("--backend nccl needs --device cuda; use --backend gloo")
    amp, amp_why = _precision(settings, on_cuda, kept.get("amp_dtype"))
    threads, threads_why = _threads(settings, local_world, kept.get("threads"))
    deterministic = settings.deterministic
    tf32, autotune = on_cuda and amp != "float32" and not deterministic, on_cuda and not deterministic
    why = [f"device {device}", amp_why, threads_why]
    if on_cuda:
        why.append(_kernels(tf32, autotune))
    return Runtime(device, backend, threads, amp, deterministic, tf32, autotune, tuple(why))


def _precision(settings: Machine, on_cuda: bool, kept: object) -> tuple[str, str]:
    import torch

    chosen, why = (settings.amp_dtype, "as asked") if settings.amp_dtype != "auto" else (kept, "as this run began")
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


def _threads(settings: Machine, local_world: int, kept: object) -> tuple[int, str]:
    usable = len(os.sched_getaffinity(0))
    if settings.threads:
        return settings.threads, f"{settings.threads} threads as asked"
    if isinstance(kept, int) and kept <= usable:
        return kept, f"{kept} threads as this run began"
    # not OMP_NUM_THREADS: torchrun sets it to 1 for every worker, however many cores there are
    share = max(1, usable // local_world)
    more = f"; the run began with {kept}, so rounding will differ" if kept else ""
    return share, f"{share} threads = {usable} cores / {local_world} processes{more}"


def _kernels(tf32: bool, autotune: bool) -> str:
    """The message about CUDA kernels: how float32 products are computed, and whether a resume is bitwise identical."""
    products = "float32 products may use TF32" if tf32 else "float32 products without TF32"
    if autotune:
        return f"{products}; cuDNN chooses its kernels by timing them, so that only --deterministic resumes bit for bit"
    return f"{products}; deterministic kernels"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is an out-of-memory error of Python, of torch on a CPU, or of CUDA."""
    while error is not None:
        text = str(error).lower()
        refused = isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)
        if refused or isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_told(what: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a UsageError. what: when it happened, and what the user can do."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        line = str(error).splitlines()[0] if str(error) else "no more is known"
        # from None, so that an enclosing memory_told does not wrap it again: the innermost one knows the most
        raise UsageError(f"out of memory {what} ({type(error).__name__}: {line})") from None


def apply(runtime: Runtime) -> None:
    """Set this process's threads, denormal handling, deterministic kernels and CUDA device."""
    import torch

    torch.set_num_threads(runtime.threads)
    # late in training gradients reach denormals, which some processors compute a hundred times slower
    torch.set_flush_denormal(True)
    if runtime.device.startswith("cuda"):
        torch.cuda.set_device(runtime.device)
        torch.backends.cudnn.benchmark = runtime.autotune
        torch.backends.cudnn.allow_tf32 = runtime.tf32
        torch.backends.cuda.matmul.allow_tf32 = runtime.tf32
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires this for a deterministic cuBLAS
        # otherwise deterministic mode also fills every tensor that will be overwritten anyway, such as pinned batches
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by its module
    if runtime.deterministic != torch.are_deterministic_algorithms_enabled():  # also off: a notebook may train twice
        torch.use_deterministic_algorithms(runtime.deterministic)
