"""A seeded shuffle that is computed, not stored: element i of a permutation of any size in constant time.

A Feistel network permutes the bits of i under a key: each round replaces one half of them by itself xor a hash of the
other half, which is invertible, so different i stay different. Its domain is the next power of two above the size; a
result outside the size goes through the network again ("cycle walking") until it is inside, fewer than two times on
average. It uses only integer arithmetic of NumPy arrays, so the order is the same on every machine and with every NumPy
release.
"""

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment: its multiples are far apart, so that their hashes are well mixed."""
_ROUNDS = 12
_MASK = 0xFFFFFFFFFFFFFFFF


def mixed(value: int, *more: int) -> int:
    """A 64-bit hash of some integers (SplitMix64's finaliser applied to each)."""
    result = 0
    for part in (value, *more):
        result = ((result ^ part) + int(STEP)) & _MASK
        result = ((result ^ (result >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        result = ((result ^ (result >> 27)) * 0x94D049BB133111EB) & _MASK
        result ^= result >> 31
    return result


def permuted(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """The images of `indices`, int64 [n], under the permutation of [0, size) with `key`."""
    bits = max(2, (size - 1).bit_length())
    result = indices.astype(np.uint64)
    pending = np.arange(len(result))
    while pending.size:
        result[pending] = _feistel(result[pending], bits, key)
        pending = pending[result[pending] >= size]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, key: int) -> np.ndarray:
    """One pass over [0, 2^bits); the halves may differ by one bit."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for turn in range(0, _ROUNDS, 2):
        high ^= hashed(low, mixed(key, turn)) & high_mask
        low ^= hashed(high, mixed(key, turn + 1)) & low_mask
    return (high << low_bits) | low


def hashed(values: np.ndarray, key: int) -> np.ndarray:
    """64 well-mixed bits of each value, uint64 (MurmurHash3's finaliser); products wrap around."""
    values = values ^ np.uint64(key)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
