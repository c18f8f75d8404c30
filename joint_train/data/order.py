"""Orders without state: a hash of (seed, stream, index) instead of a random generator.

Any part of an order can be made without what comes before it, and no release of a library changes it.
"""

from functools import lru_cache

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


@lru_cache(maxsize=8)
def permutation(count: int, *key: int) -> np.ndarray:
    """An order of ``count`` things, ``[count]`` int64. The last few are kept: don't write into them."""
    return np.argsort(hash64(np.arange(count), *key), kind="stable")


def uniform(first: int, last: int, *key: int) -> np.ndarray:
    """Numbers in [0, 1) for the indices [first, last)."""
    return (hash64(np.arange(first, last), *key) >> np.uint64(11)) * 2.0**-53
