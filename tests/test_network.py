"""What is told of a network that a builder returns."""

from __future__ import annotations

from small_network import all_in_evaluation_mode, frozen_norm, small

from dtrain.model.network import mode_told


def test_a_network_in_evaluation_mode_is_told_and_one_with_a_frozen_part_is_not() -> None:
    line = mode_told(all_in_evaluation_mode(5), "mine")
    assert line is not None
    assert line.startswith("architecture mine returns its network in evaluation mode, which training keeps: ")
    assert mode_told(frozen_norm(5), "mine") is None
    assert mode_told(small(5), "mine") is None
