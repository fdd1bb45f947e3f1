"""The one source of randomness outside the network: a hash from counters to numbers.

Nothing here has state. Whatever is "random" about the data - the order of samples, each augmentation, the split - is
`key(seed, stream, *counters)`, so it can be computed again for any step, alone, on any machine. Values may never
change: golden values stand in tests/test_keyed.py. numpy only.
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
    """What a key is for. A number, once given, is never given again: other numbers are other runs."""

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
    """64 well-mixed bits for (seed, stream, counters); counters are ints or integer arrays and broadcast.

    Returns uint64 of the broadcast shape. Word by word: state = mix(state + GOLDEN + word), from state 0. Negative
    numbers count modulo 2^64. O(result), no state.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        state: Keys = np.zeros((), dtype=np.uint64)
        for word in (seed, int(stream), *counters):
            state = _mix(state + GOLDEN + _words(word))
    return state


def _words(value: Any) -> Keys:
    if isinstance(value, int):
        return np.asarray(value % 2**64, dtype=np.uint64)
    return np.asarray(value).astype(np.uint64)


def integers(keys: Keys, n: int) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, n) from keys, 1 <= n <= 2^31: the high 32 bits times n, shifted. Bias below n / 2^32."""
    return (((keys >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def uniforms(keys: Keys) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) from keys: the high 53 bits over 2^53, exact."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of range(n) in which epoch `epoch` reads its samples.

    A stable argsort of one key a position, so no library's shuffle and no version of one can change it. O(n log n).
    """
    return np.argsort(key(seed, Stream.ORDER, epoch, np.arange(n, dtype=np.uint64)), kind="stable").astype(np.int64)


def torch_seed(seed: int, stream: Stream, *counters: int) -> int:
    """A key as a non-negative int below 2^63, which every generator (torch, numpy, random) takes as its seed."""
    return int(key(seed, stream, *counters)) >> 1


def stratified(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which samples are held out: from each class the `fraction` with the smallest keys, rounded.

    At least one of a class is held out and at least one stays; a class of one sample stays. labels: int64 [n]; returns
    bool [n], True for held out. The same for every process and every run with this seed.
    """
    keys = key(seed, Stream.SPLIT, np.arange(len(labels), dtype=np.uint64))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return held
