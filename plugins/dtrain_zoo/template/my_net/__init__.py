"""my_net: three convolutions, a start for something of your own."""

from torch import nn


def my_net(num_classes: int, *, in_channels: int = 3, width: int = 32) -> nn.Module:
    """[b, in_channels, H, W] to [b, num_classes] logits, for images of 8 x 8 pixels and more."""
    layers: list[nn.Module] = []
    for channels in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
