"""Millions of texts and numbers in numpy arrays: Python objects take more memory, and forked processes copy them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

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


def is_among(texts: Iterable[str], others: Iterable[str]) -> np.ndarray:
    """Whether each text is one of the others, bool; by hashes, since a set of all texts takes more memory."""
    return np.isin(_hashes(texts), _hashes(others))


def _hashes(texts: Iterable[str]) -> np.ndarray:
    hashed = (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.fromiter(hashed, np.uint64)


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


class Bytes:
    """Byte strings of any length in one buffer, to which further ones can be added."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._data[self._ends[index - 1] if index else 0 : self._ends[index]])

    def append(self, data: bytes) -> None:
        """Add one."""
        self._data += data
        self._ends.append(len(self._data))


class TextColumn:
    """Texts of any length in one buffer, to which further ones can be added. Lone surrogates are kept."""

    def __init__(self) -> None:
        self.encoded = Bytes()
        """The texts in UTF-8."""

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> str:
        return self.encoded[index].decode("utf-8", "surrogatepass")

    def append(self, text: str) -> None:
        """Add a text."""
        self.encoded.append(text.encode("utf-8", "surrogatepass"))
