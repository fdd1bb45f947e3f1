"""my_net keeps dtrain's contract for architectures."""

from dtrain.testing import check_architecture


def test_my_net_is_an_architecture() -> None:
    check_architecture("my_net", image_size=32, num_classes=10)
    check_architecture("my_net", image_size=28, num_classes=3, in_channels=1, width=8)
