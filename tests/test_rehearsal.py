"""What the rehearsal shows to a network, and what it finds out about it."""

from __future__ import annotations

import pytest
import torch
from small_network import all_in_evaluation_mode, frozen_norm, small
from torch import Tensor, nn

from dtrain.model.rehearsal import buffers_move_output, first_output, noise


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_noise_lies_in_memory_as_the_images_will_and_has_the_same_values(memory_format: torch.memory_format) -> None:
    images = noise(3, (2, 3, 8, 8), torch.float32, memory_format)
    assert images.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, noise(3, (2, 3, 8, 8), torch.float32, torch.contiguous_format))
    assert -1 <= images.min() < images.max() < 1


class RunningMean(nn.Module):
    """Subtracts a mean that it keeps, in training too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(images.mean(), 0.1)
        return images.mean((2, 3)) - self.mean


def test_statistics_of_frozen_norms_are_equal_on_all_processes_and_need_not_be_sent() -> None:
    images = noise(0, (2, 3, 32, 32), torch.float32, torch.contiguous_format)
    assert buffers_move_output(RunningMean(), images, 0)
    assert not any(buffers_move_output(build(5), images, 0) for build in (small, frozen_norm, all_in_evaluation_mode))


def test_the_first_pass_gives_the_head_and_leaves_buffers_as_they_were() -> None:
    module = small(5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    images = noise(0, (2, 3, 32, 32), torch.float32, torch.channels_last)
    assert first_output(module, images, "small", 5) == ("9.weight", "9.bias")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
