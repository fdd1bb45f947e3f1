"""ResNet-18 for small images (He et al. 2016, with a 3x3 stem and no max-pool for 32x32)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

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
    """Four stages of blocks, a global average, a linear classifier; [b, C, H, W] to [b, K]."""

    def __init__(self, num_classes: int, in_channels: int, blocks: tuple[int, ...], zero_last_norm: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(True))
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
        """Logits."""
        logits: Tensor = self.classify(self.stages(self.stem(images)).mean((2, 3)))
        return logits


def resnet18(num_classes: int, *, in_channels: int = 3, zero_last_norm: bool = False) -> nn.Module:
    """ResNet-18 in its CIFAR form; 11,173,962 parameters for 10 classes of RGB images.

    zero_last_norm: each block begins as its shortcut (Goyal et al. 2017, section 5.1).
    """
    return ResNet(num_classes, in_channels, (2, 2, 2, 2), zero_last_norm)
