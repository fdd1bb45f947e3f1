"""Claims about the keyed hash: the published mixer, values that never change, permutations, even spread."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dtrain import keyed
from dtrain.keyed import Stream


def mix(z: int) -> int:
    """The splitmix64 finaliser in Python's own integers (Vigna, prng.di.unimi.it/splitmix64.c)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def by_hand(*words: int) -> int:
    state = 0
    for word in words:
        state = mix((state + 0x9E3779B97F4A7C15 + word) % 2**64)
    return state


def test_the_mixer_of_these_tests_is_the_published_one() -> None:
    # the first three outputs of splitmix64 from seed 0, as Java's SplittableRandom and Vigna's C give them
    outputs = [mix(n * 0x9E3779B97F4A7C15 % 2**64) for n in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("counters", [(), (0,), (1, 2, 3), (2**63,), (2**64 - 1,), (-1, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, -1])
def test_a_key_chains_the_mixer_over_its_words(seed: int, counters: tuple[int, ...]) -> None:
    for stream in Stream:
        assert int(keyed.key(seed, stream, *counters)) == by_hand(seed, stream, *counters)


def test_golden_values_never_change() -> None:
    assert [int(stream) for stream in (Stream.ORDER, Stream.SPLIT, Stream.INIT, Stream.DROPOUT)] == [1, 2, 3, 4]
    assert [int(stream) for stream in (Stream.FLIP, Stream.SHIFT, Stream.CUTOUT, Stream.REHEARSAL)] == [5, 6, 7, 8]
    assert [int(stream) for stream in (Stream.SYNTHETIC, Stream.CHECKSUM, Stream.CROP, Stream.SCALE)] == [9, 10, 11, 12]
    assert [int(stream) for stream in (Stream.AFFINE, Stream.JITTER, Stream.MIX, Stream.ERASE, Stream.ERASED)] == [
        13,
        14,
        15,
        16,
        17,
    ]
    assert int(keyed.key(0, Stream.ORDER)) == 0x2A98F501AF37E97F
    assert int(keyed.key(17, Stream.FLIP, 3, 49_999)) == 0xA8159659D683D9EA
    assert keyed.order(10, 0, 0).tolist() == [2, 9, 5, 7, 8, 4, 6, 0, 1, 3]
    assert keyed.order(10, 7, 3).tolist() == [5, 8, 9, 6, 3, 7, 2, 4, 0, 1]


def test_counters_broadcast_and_arrays_give_what_scalars_give() -> None:
    rows, columns = np.arange(3).reshape(3, 1), np.array([-5, 0, 7, 2**40], dtype=np.int64)
    keys = keyed.key(9, Stream.SHIFT, rows, columns)
    assert (keys.dtype, keys.shape) == (np.uint64, (3, 4))
    assert keys.tolist() == [[by_hand(9, Stream.SHIFT, r, c) for c in columns.tolist()] for r in range(3)]


def test_an_order_is_the_sorting_of_its_keys_and_a_permutation() -> None:
    for n in (1, 2, 1000):
        order = keyed.order(n, 3, 8)
        assert order.dtype == np.int64
        assert order.tolist() == sorted(range(n), key=lambda i: by_hand(3, Stream.ORDER, 8, i))
    assert keyed.order(0, 3, 8).tolist() == []


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(keyed.order(100, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_integers_are_the_high_bits_scaled_and_cover_the_range_evenly() -> None:
    ends = np.array([0, 2**32 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert keyed.integers(ends, 9).tolist() == [0, 0, 4, 8]
    assert keyed.integers(ends, 2**31).tolist() == [0, 0, 2**30, 2**31 - 1]
    assert keyed.integers(ends, 1).tolist() == [0, 0, 0, 0]
    counts = np.bincount(keyed.integers(keyed.key(0, Stream.SHIFT, np.arange(90_000)), 9), minlength=9)
    # 9 bins of 10,000: chi-squared with 8 degrees of freedom stays below 26.1 in 999 of 1,000 cases
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 26.1


def test_uniforms_are_the_high_53_bits_and_below_1() -> None:
    ends = np.array([0, 2**11 - 1, 2**11, 2**63, 2**64 - 1], dtype=np.uint64)
    assert keyed.uniforms(ends).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]


def test_a_torch_seed_is_taken_by_every_generator() -> None:
    for step in range(100):
        seed = keyed.torch_seed(0, Stream.DROPOUT, step, 1)
        assert seed == by_hand(0, Stream.DROPOUT, step, 1) // 2
        torch.Generator().manual_seed(seed)
        np.random.default_rng(seed)
        random.Random(seed)


def test_a_split_holds_out_the_same_fraction_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    held = keyed.stratified(labels, 0.1, seed=0)
    assert [int(held[labels == label].sum()) for label in range(3)] == [10, 5, 1]
    smallest = sorted(range(100), key=lambda i: by_hand(0, Stream.SPLIT, i))[:10]
    assert np.flatnonzero(held[:100]).tolist() == sorted(smallest)
    assert not np.array_equal(held, keyed.stratified(labels, 0.1, seed=1))


@pytest.mark.parametrize(("size", "fraction", "count"), [(2, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (10, 0.99, 9)])
def test_a_split_takes_at_least_one_and_leaves_at_least_one(size: int, fraction: float, count: int) -> None:
    assert int(keyed.stratified(np.zeros(size, dtype=np.int64), fraction, seed=0).sum()) == count
