"""A network that has what can go wrong in a resume: batch norm, dropout, filters in channels-last memory."""

from __future__ import annotations

from torch import nn


def small(num_classes: int, *, in_channels: int = 3) -> nn.Module:
    """[b, C, 32, 32] to [b, K]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def frozen_norm(num_classes: int, *, in_channels: int = 3) -> nn.Module:
    """The same with its first batch norm kept in evaluation mode, and so its statistics as they are."""
    network = small(num_classes, in_channels=in_channels)
    network[1].eval()
    return network


def all_in_evaluation_mode(num_classes: int, *, in_channels: int = 3) -> nn.Module:
    """The same as a builder returns it that has just loaded and looked at it."""
    return small(num_classes, in_channels=in_channels).eval()
