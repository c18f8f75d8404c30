"""Orders without state: a hash of (seed, stream, index) instead of a random generator.

Any part of an order can be made without what comes before it, and no release of a library changes it.
"""

import numpy as np


def hash64(index: np.ndarray, *key: int) -> np.ndarray:
    """A well-mixed 64-bit number for each index (splitmix64, Steele, Lea and Flood 2014, absorbing the key)."""
    state = np.uint64(0)
    for part in key:
        state = _mix(state ^ np.uint64(part % (1 << 64)))
    return _mix(index.astype(np.uint64) ^ state)


def _mix(x):
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permutation(count: int, *key: int) -> np.ndarray:
    """An order of ``count`` things, ``[count]``, of 4 bytes each where those are enough."""
    order = np.argsort(hash64(np.arange(count), *key), kind="stable")
    return order.astype(np.int32) if count < 1 << 31 else order


def fractions(index: np.ndarray, *key: int) -> np.ndarray:
    """A number in [0, 1) for each index, of so few bits that its sum with an index below 2^32 is exact."""
    return (hash64(index, *key) >> np.uint64(44)) * 2.0**-20
