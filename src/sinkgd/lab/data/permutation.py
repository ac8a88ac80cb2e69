"""A pseudo-random permutation of 0 … n-1 that needs no memory.

A Feistel network permutes the numbers of b bits, 2^b the smallest power of two ≥ n; a number that
it sends to n or beyond is sent through it again until it lands below n ("cycle walking"), which
keeps the map a bijection. Each walk takes less than two passes on average, since 2^b < 2n.

    one round:  (left, right) → (right, left ⊕ F(right))    F: splitmix64's mixer, keyed

References: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method 2.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # even, so that halves of unequal width end in their own places

# splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(positions: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return where the permutation of ``(seed, epoch, n)`` sends each of ``positions``.

    Args:
        positions: Any shape, entries in [0, n).
        n: Length of the permutation, from 1 to 2^62.
        seed: At least 0.
        epoch: At least 0; every epoch has a permutation of its own.

    Examples:
        >>> permute(np.arange(7), 7, seed=0, epoch=0)
        array([4, 6, 0, 2, 1, 3, 5])
    """
    bits = max(1, (n - 1).bit_length())
    keys = _round_keys(seed, epoch)
    images = _feistel(positions.astype(np.uint64).reshape(-1), bits, keys)
    walking = np.flatnonzero(images >= n)
    while walking.size:
        images[walking] = _feistel(images[walking], bits, keys)
        walking = walking[images[walking] >= n]
    return images.astype(np.int64).reshape(positions.shape)


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    # SeedSequence's output is fixed by numpy's compatibility policy.
    return tuple(np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64))


def _feistel(
    numbers: NDArray[np.uint64], bits: int, keys: tuple[np.uint64, ...]
) -> NDArray[np.uint64]:
    low, high = bits // 2, bits - bits // 2  # the widths of the right and the left half
    left, right = numbers >> np.uint64(low), numbers & _mask(low)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & _mask(high))
        low, high = high, low
    return (left << np.uint64(low)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
