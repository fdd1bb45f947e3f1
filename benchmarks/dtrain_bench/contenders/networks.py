"""The networks of the comparison: All-CNN-C, limited by its convolutions, and a small one, limited by data loading."""

from __future__ import annotations

from dtrain_zoo.allcnn import allcnn_c
from torch import nn


def small(num_classes: int, *, in_channels: int = 3) -> nn.Module:
    """Two strided convolutions and a linear layer: 129,184 multiply-adds for an RGB image of 32x32 and 10 classes."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def build(name: str) -> nn.Module:
    """The network called `name`, "small" or "allcnn_c", for RGB images of 10 classes."""
    return small(10) if name == "small" else allcnn_c(10, norm="batch")
