"""A bare training loop to compare dtrain with: forward, backward and SGD on one batch that stays in memory.

It has the network, batch size, precision, threads and allocator settings of the trainer that it is compared with, but
no loader, evaluation, log or checkpoint. `python -m dtrain_bench.bare BATCH STEPS WARMUP THREADS` prints the images per
CPU-second of STEPS steps after WARMUP steps.
"""

from __future__ import annotations

import sys
import time

from dtrain.runtime import tune_allocator


def main(batch_size: int, steps: int, warmup: int, threads: int) -> None:
    """Run the loop and print its images per CPU-second."""
    tune_allocator()
    import torch
    from dtrain_zoo.allcnn import allcnn_c
    from torch.nn import functional as F

    from dtrain.runtime import decide
    from dtrain.settings.machine import Machine

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    dtype = decide(Machine(device="cpu"), local_rank=0, local_world=1).dtype()
    module = allcnn_c(10, norm="batch").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(batch_size, 3, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    started = 0.0
    for step in range(warmup + steps):
        if step == warmup:
            started = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            output = module(images)
        torch.autograd.backward(F.cross_entropy(output.float(), labels))
        optimizer.step()
    print(steps * batch_size / (time.process_time() - started))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:5]))
