"""The trainers that dtrain is compared with: the same task (`task.py`) in a script for each, written as users would.

plain_pytorch     DataLoader, torchvision's v2 transforms, a loop
with_lightning    the same in a LightningModule, run by a Trainer
with_accelerate   the loop, prepared by an Accelerator

Each runs as `python -m dtrain_bench.contenders.NAME TASK`, where TASK is JSON, and prints its images per second. Users
would not write only the line that counts a step. A script has two forms. `defaults` follows the first page of a
library's documentation: float32, PIL images. `tuned` adds what its pages on speed recommend: bfloat16, channels-last,
tensors instead of PIL images, persistent workers, a fused optimizer, and neither reading values nor extras in a step.
None of the scripts uses dtrain.
"""
