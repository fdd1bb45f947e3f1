"""All-CNN-C: a network of convolutions only (Springenberg et al. 2015, "Striving for simplicity", table 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn


class AllCNN(nn.Module):
    """Nine convolutions and a global average; maps [b, C, H, W] to [b, K]. H and W must be at least 12."""

    def __init__(self, num_classes: int, in_channels: int, dropout: bool, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(*self._layers(in_channels, dropout, norm))
        self.classify = nn.Conv2d(192, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # torch's default weights are too small for nine layers without a norm: accuracy stays at chance
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def _layers(in_channels: int, dropout: bool, norm: str) -> Iterator[nn.Module]:
        if dropout:
            yield nn.Dropout(0.2)
        # (width, kernel, stride, padding) of each layer before the classifier
        plan = [(96, 3, 1, 1), (96, 3, 1, 1), (96, 3, 2, 1), (192, 3, 1, 1), (192, 3, 1, 1), (192, 3, 2, 1)]
        plan += [(192, 3, 1, 0), (192, 1, 1, 0)]
        channels = in_channels
        for width, kernel, stride, padding in plan:
            yield nn.Conv2d(channels, width, kernel, stride, padding, bias=norm == "none")
            if norm == "batch":
                yield nn.BatchNorm2d(width)
            yield nn.ReLU(inplace=True)
            if dropout and stride == 2:
                yield nn.Dropout(0.5)
            channels = width

    def forward(self, images: Tensor) -> Tensor:
        """Map images [b, C, H, W] to logits [b, K]; the logit of a class is the average of its feature map."""
        maps: Tensor = self.classify(self.layers(images))
        return maps.mean((2, 3))


def allcnn_c(
    num_classes: int, *, in_channels: int = 3, dropout: bool = False, norm: Literal["none", "batch"] = "none"
) -> nn.Module:
    """All-CNN-C. It has 1,369,738 parameters for 10 classes of RGB images.

    dropout: as published, dropout of 0.2 on the image and of 0.5 after each strided layer. norm: `batch` adds a batch
    norm after each layer but the last; these layers then have no bias.
    """
    return AllCNN(num_classes, in_channels, dropout, norm)
