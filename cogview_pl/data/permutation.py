"""Keyed permutations of any size that need no table: a Feistel network over two digits, with cycle walking."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 16  # with 12, some permutations of five elements are likelier than others
_ODD = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # multipliers that mix 64 bits (SplitMix64)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_HALF = np.uint64(32)
_LARGEST = 2**62  # so that both digits fit into 32 bits, and sums of two numbers into 64


class Permutation:
    """A permutation of 0 … `size` - 1 that depends on its key alone, on every platform.

    It is computed for each index, in constant memory. An index has two digits, in bases near the root of the size; each
    round adds to one digit a random function of the other one, modulo its base, so the network permutes all pairs of
    digits. A result that is no index is permuted again until it is one (cycle walking), which is rare, because few
    pairs are no indices.

    Args:
        size: at least 1.
        key: any text.
    """

    def __init__(self, size: int, key: str) -> None:
        if not 1 <= size <= _LARGEST:
            raise ValueError(f"size must be in [1, 2**62], not {size}")
        self.size = size
        edge = math.isqrt(size - 1) + 1
        self._low = edge + edge % 2  # rounds with two odd bases would give even permutations only
        self._high = -(-size // self._low)
        digest = hashlib.shake_256(key.encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __len__(self) -> int:
        return self.size

    def of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of `indices`, int64 of the same shape; each index must be in [0, size)."""
        found = self._network(indices.astype(np.uint64))
        outside = found >= self.size
        while outside.any():
            found[outside] = self._network(found[outside])
            outside = found >= self.size
        return found.astype(np.int64)

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bases = np.uint64(self._high), np.uint64(self._low)
        digits = list(np.divmod(values, bases[1]))
        for number, key in enumerate(self._keys):
            to, by = number % 2, 1 - number % 2
            digits[to] = (digits[to] + _below(bases[to], digits[by], key)) % bases[to]
        return digits[0] * bases[1] + digits[1]  # type: ignore[no-any-return]


def _below(base: np.uint64, values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Random numbers in [0, base) that follow from values and a key."""
    mixed = values + key  # modulo 2**64, as all of these operations
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _ODD[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _ODD[1]
    mixed ^= mixed >> _SHIFTS[2]
    return ((mixed >> _HALF) * base) >> _HALF
