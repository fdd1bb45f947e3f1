"""The other ways to train: one task (`task.py`), one script for each library, as its users write it.

plain_pytorch     DataLoader, torchvision's v2 transforms, a loop
with_lightning    the same in a LightningModule, run by a Trainer
with_accelerate   the loop, prepared by an Accelerator

Each runs as `python -m dtrain_bench.contenders.NAME TASK` and prints its rates. What a user would not write is the line
that counts a step. A script has two forms: `defaults`, as the first page of a library's documentation has it (float32,
PIL pictures), and `tuned`, with what the pages on speed add (bfloat16, channels-last, tensors instead of PIL pictures,
workers that outlive an epoch, a fused update, no read-out and no extras at each step). None of them knows of dtrain.
"""
