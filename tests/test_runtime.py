"""Claims about what a process computes with: `auto` resolved once, kept by a resume, said in words."""

from __future__ import annotations

import pytest
import torch

from dtrain import runtime
from dtrain.errors import UsageError
from dtrain.settings.machine import Machine


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it answers on a host with one GPU that has bfloat16; `decide` asks it nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.mark.parametrize(
    ("machine", "tf32", "autotune", "told"),
    [
        (Machine(), True, True, "float32 products may use TF32"),
        (Machine(amp_dtype="float32"), False, True, "float32 products without TF32"),
        (Machine(deterministic=True), False, False, "float32 products without TF32; deterministic kernels"),
    ],
)
def test_tf32_is_off_where_float32_or_deterministic_kernels_are_asked_for(
    one_gpu: None, machine: Machine, tf32: bool, autotune: bool, told: str
) -> None:
    decided = runtime.decide(machine, local_rank=0, local_world=1)
    assert (decided.device, decided.backend) == ("cuda:0", "nccl")
    assert (decided.tf32, decided.autotune) == (tf32, autotune)
    assert told in decided.why[-1]


def test_a_run_with_autotuning_is_told_that_it_resumes_otherwise(one_gpu: None) -> None:
    decided = runtime.decide(Machine(), local_rank=0, local_world=1)
    assert "only --deterministic resumes bit for bit" in decided.why[-1]


def test_a_cpu_says_nothing_of_cuda() -> None:
    decided = runtime.decide(Machine(device="cpu"), local_rank=0, local_world=2)
    assert (decided.device, decided.backend, decided.tf32, decided.autotune) == ("cpu", "gloo", False, False)
    assert len(decided.why) == 3


def test_a_resume_keeps_precision_and_threads() -> None:
    kept = {"amp_dtype": "float32", "threads": 1}
    decided = runtime.decide(Machine(device="cpu"), local_rank=0, local_world=1, kept=kept)
    assert (decided.amp_dtype, decided.threads) == ("float32", 1)
    assert decided.why[1:] == ("float32 as this run began", "1 threads as this run began")


def test_what_is_not_here_is_told(one_gpu: None) -> None:
    with pytest.raises(UsageError, match="2 processes on this host but 1 CUDA devices; start 1, or --device cpu"):
        runtime.decide(Machine(), local_rank=0, local_world=2)
    with pytest.raises(UsageError, match="--backend nccl needs --device cuda"):
        runtime.decide(Machine(device="cpu", backend="nccl"), local_rank=0, local_world=1)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_every_refusal_of_memory_is_known_as_one(text: str) -> None:
    assert runtime.is_out_of_memory(RuntimeError(text))
    assert not runtime.is_out_of_memory(RuntimeError("a shape is wrong"))
