"""Millions of texts and numbers in numpy arrays: Python objects take more memory, and forked processes copy them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

_WHOLE = (np.uint8, np.uint16, np.int32, np.uint32)


def packed(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest of a few types that holds them all."""
    if not len(numbers):
        return numbers.astype(np.uint8)
    least, largest = int(numbers.min()), int(numbers.max())
    fits = (kind for kind in _WHOLE if np.iinfo(kind).min <= least and largest <= np.iinfo(kind).max)
    return numbers.astype(next(fits, np.int64), copy=False)


def counts_of(ends: np.ndarray) -> np.ndarray:
    """int64, how many lie between each end and the one before it."""
    counts: np.ndarray = np.diff(ends.astype(np.int64), prepend=0)
    return counts


class Texts:
    """Texts of any length, one after the other in an array of bytes. Lone surrogates are kept.

    Args:
        data: uint8, the texts in UTF-8.
        ends: where each text ends in `data`.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    @staticmethod
    def of(texts: Iterable[str]) -> Texts:
        """Pack texts."""
        data, ends = bytearray(), array("q")
        for text in texts:
            data += text.encode("utf-8", "surrogatepass")
            ends.append(len(data))
        return Texts(np.frombuffer(data, np.uint8), packed(np.frombuffer(ends, np.int64)))

    @staticmethod
    def joined(parts: Sequence[Texts]) -> Texts:
        """The texts of all parts, in their order."""
        firsts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = np.concatenate([np.empty(0, np.uint8), *(part.ends for part in parts)], dtype=np.int64)
        ends += np.repeat(firsts[:-1], [len(part) for part in parts])
        return Texts(np.concatenate([np.empty(0, np.uint8), *(part.data for part in parts)]), packed(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return self.encoded(index).decode("utf-8", "surrogatepass")

    def encoded(self, index: int) -> bytes:
        """The UTF-8 of a text."""
        index = range(len(self))[index]
        return self.data[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])].tobytes()
