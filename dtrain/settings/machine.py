"""Settings of the computation: device, processes, precision and memory layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.settings.values import Panel, above, setting, within


@dataclass(frozen=True)
class Machine(Panel):
    """Where a run is computed, by how many threads, in which precision and memory layout."""

    title: ClassVar[str] = "Machine"
    attribute: ClassVar[str] = "machine"

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "device to train on; auto takes cuda if there is a GPU, else cpu", place=True
    )
    backend: Literal["auto", "gloo", "nccl"] = setting(
        "auto", "torch.distributed backend that averages the gradients; auto takes nccl on CUDA, else gloo", place=True
    )
    threads: int = setting(
        0,
        "CPU threads of each process; 0 divides the cores among the processes of this machine",
        within("[0, 65536]"),
        place=True,
    )
    dist_timeout: float = setting(
        300.0, "seconds after which a process that does not answer is given up and the run ends", above(0), place=True
    )
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "data type of autocast (mixed precision); the weights stay float32; auto takes bfloat16 if the GPU or CPU "
        "computes it natively, else float16 on a GPU and float32 on a CPU",
    )
    channels_last: bool = setting(True, "keep images and convolution weights in channels-last (NHWC) memory format")
    compile: bool = setting(False, "compile the network with torch.compile")
    deterministic: bool = setting(
        False, "use deterministic kernels only: slower on CUDA, where they are needed for bit-identical results"
    )
