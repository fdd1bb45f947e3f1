"""What a run is computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.settings.values import Panel, above, at_least, setting


@dataclass(frozen=True)
class Machine(Panel):
    """Device, processes, precision and memory layout."""

    title: ClassVar[str] = "Machine"
    attribute: ClassVar[str] = "machine"

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device; auto takes cuda where there is one", place=True)
    backend: Literal["auto", "gloo", "nccl"] = setting(
        "auto", "backend of torch.distributed for gradients; auto takes nccl on cuda, else gloo", place=True
    )
    threads: int = setting(
        0, "compute threads of each process; 0 divides the cores among the processes", at_least(0), place=True
    )
    dist_timeout: float = setting(
        300.0, "seconds after which a process that does not answer is given up and the run ends", above(0), place=True
    )
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "type of the arithmetic under autocast; the weights stay float32"
    )
    channels_last: bool = setting(True, "keep images and filters in channels-last memory")
    compile: bool = setting(False, "compile the network with torch.compile")
    deterministic: bool = setting(False, "use deterministic kernels only; on CUDA slower, and needed for equal bits")
