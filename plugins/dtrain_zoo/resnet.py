"""ResNet-18 (He et al. 2016, "Deep residual learning", table 1), with a smaller stem for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 96  # side in pixels; smaller images lose too much detail in the published stem, which divides it by four


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut around them, which is a 1x1 convolution if the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """[b, channels, H, W] to [b, width, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Four stages of blocks, a global average and a linear classifier; maps [b, C, H, W] to [b, K]."""

    def __init__(
        self, num_classes: int, in_channels: int, blocks: tuple[int, ...], zero_last_norm: bool, large_stem: bool
    ) -> None:
        super().__init__()
        kernel, stride, padding = (7, 2, 3) if large_stem else (3, 1, 1)
        first = nn.Conv2d(in_channels, 64, kernel, stride, padding, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(64), nn.ReLU(True))
        if large_stem:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        stages: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                width = 64 * 2**stage
                stages.append(Block(channels, width, stride=2 if stage and block == 0 else 1))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.classify = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_last_norm and isinstance(module, Block):
                nn.init.zeros_(module.norm2.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images [b, C, H, W] to logits [b, K]."""
        logits: Tensor = self.classify(self.stages(self.stem(images)).mean((2, 3)))
        return logits


def resnet18(
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    stem: Literal["auto", "small", "large"] = "auto",
    zero_last_norm: bool = False,
) -> nn.Module:
    """ResNet-18. For 10 classes of RGB images it has 11,173,962 parameters, or 11,181,642 with the large stem.

    stem: `small` is one 3x3 convolution, as is usual for CIFAR; `large` is the published 7x7 convolution of stride 2
    with a max-pool, after which the rest of the network needs a sixteenth of the arithmetic; `auto` is large for images
    of 96 pixels a side and more, else small. zero_last_norm: the weights of the last norm of each block start at zero,
    so that each block starts as its shortcut alone (Goyal et al. 2017, section 5.1).
    """
    large = stem == "large" or (stem == "auto" and image_size >= LARGE)
    return ResNet(num_classes, in_channels, (2, 2, 2, 2), zero_last_norm, large)
