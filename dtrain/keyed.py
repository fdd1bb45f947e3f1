"""Counter-based random numbers: a hash of (seed, stream, counters), the source of all randomness in the data.

Nothing here has state. Everything random about the data (the order of the samples, each augmentation, the held-out
split) is computed from `key(seed, stream, *counters)`, so it can be computed again for any single step on any machine.
The values must never change; tests/test_keyed.py compares them with golden values. Needs numpy alone.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64 (Steele, Lea, Flood 2014)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)  # Stafford's variant 13, the finaliser that splitmix64 uses
MIX_2 = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """What a key is used for. The numbers must never change or be reused, since every run depends on them."""

    ORDER = 1
    SPLIT = 2
    INIT = 3
    DROPOUT = 4
    FLIP = 5
    SHIFT = 6
    CUTOUT = 7
    REHEARSAL = 8
    SYNTHETIC = 9
    CHECKSUM = 10
    CROP = 11
    SCALE = 12
    AFFINE = 13
    JITTER = 14
    MIX = 15
    ERASE = 16
    ERASED = 17


def _mix(z: Keys) -> Keys:
    """The splitmix64 finaliser: a bijection of 64 bits in which every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


def key(seed: int, stream: Stream, *counters: Any) -> Keys:
    """A uint64 hash of (seed, stream, counters). Counters are ints or integer arrays, which are broadcast.

    Returns an array of the broadcast shape. The hash starts from state 0 and takes in one number after the other:
    state = mix(state + GOLDEN + number). Negative numbers are taken modulo 2^64.
    """
    with np.errstate(over="ignore"):  # the overflow is wanted: this is arithmetic modulo 2^64
        state: Keys = np.zeros((), dtype=np.uint64)
        for word in (seed, int(stream), *counters):
            state = _mix(state + GOLDEN + _words(word))
    return state


def _words(value: Any) -> Keys:
    if isinstance(value, int):
        return np.asarray(value % 2**64, dtype=np.uint64)
    return np.asarray(value).astype(np.uint64)


def integers(keys: Keys, n: int) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, n) from keys, for 1 <= n <= 2^31: (high 32 bits * n) >> 32. Bias below n / 2^32."""
    return (((keys >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def uniforms(keys: Keys) -> npt.NDArray[np.float64]:
    """Uniform float64 numbers in [0, 1) from keys: the high 53 bits divided by 2^53, without rounding."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of range(n) in which epoch `epoch` reads its samples.

    It is a stable argsort of one key for each position, so it does not depend on a library's shuffle. O(n log n).
    """
    return np.argsort(key(seed, Stream.ORDER, epoch, np.arange(n, dtype=np.uint64)), kind="stable").astype(np.int64)


def torch_seed(seed: int, stream: Stream, *counters: int) -> int:
    """A key as an int in [0, 2^63), to seed a random generator of torch or Python with."""
    return int(key(seed, stream, *counters)) >> 1


def stratified(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """A stratified split: which samples are held out, from each class the rounded `fraction` with the smallest keys.

    Of each class at least one sample is held out and at least one is kept for training; the sample of a class that has
    only one is kept. labels: int64 [n]; returns bool [n], True for held out. Depends on the seed and the labels alone.
    """
    keys = key(seed, Stream.SPLIT, np.arange(len(labels), dtype=np.uint64))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return held
