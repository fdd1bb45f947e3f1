"""The loop to compare with on a GPU: one resident batch, forward, backward, SGD.

`python -m dtrain_bench.bare_gpu ARCH BATCH STEPS`. Same network, batch, precision, layout and update as the trainer in
benchmarks/gpu.sh; no loader, log or checkpoint. Prints images per second of the last two thirds of the steps.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.nn import functional as F

from dtrain.plugins import find, load


def main(arch: str, batch_size: int, steps: int) -> None:
    """Run the loop and print its rate."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda")
    module = load(find("architecture", arch))(10).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(batch_size, 3, 32, 32, device=device, dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,), device=device)
    started, warmup = 0.0, steps // 3
    for step in range(steps):
        if step == warmup:
            torch.cuda.synchronize()
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = module(images)
        torch.autograd.backward(F.cross_entropy(output.float(), labels))
        optimizer.step()
    torch.cuda.synchronize()
    print(f"{(steps - warmup) * batch_size / (time.perf_counter() - started):.0f} images/s")


if __name__ == "__main__":
    main(sys.argv[1], *(int(argument) for argument in sys.argv[2:4]))
