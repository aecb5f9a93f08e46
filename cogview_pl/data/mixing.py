"""Training sets that mix two data sets, each with a share of the samples."""

from __future__ import annotations

from typing import TypeVar

from torch.utils.data import Dataset

T = TypeVar("T")


class Mixed(Dataset[T]):
    """The samples of two data sets, each repeated in its order: `counts[0]` of the first, then those of the second.

    Args:
        parts: map-style data sets, not empty.
        counts: samples of each of them.
    """

    def __init__(self, parts: tuple[Dataset[T], Dataset[T]], counts: tuple[int, int]) -> None:
        self._parts = parts
        self._sizes = len(parts[0]), len(parts[1])  # type: ignore[arg-type]
        self._counts = counts

    def __len__(self) -> int:
        return sum(self._counts)

    def __getitem__(self, index: int) -> T:
        part, inner = self._place(index)
        return part[inner]

    def key(self, index: int) -> str:
        """The name of a sample in a message."""
        part, inner = self._place(index)
        return str(part.key(inner))  # type: ignore[attr-defined]

    def _place(self, index: int) -> tuple[Dataset[T], int]:
        """The data set that a sample comes from, and its index there."""
        index = range(len(self))[index]
        number = int(index >= self._counts[0])
        return self._parts[number], (index - number * self._counts[0]) % self._sizes[number]


def mixed(main: Dataset[T], other: Dataset[T], share: float) -> Dataset[T]:
    """Samples of `other` among those of `main`, so that they make up `share` of all.

    Every sample of both occurs at least once; the part that is too small for its share is repeated. The result does not
    depend on chance, so a resumed run finds the same order.

    Args:
        main, other: map-style data sets, not empty.
        share: 0 … below 1; 0 gives `main` itself.
    """
    if share == 0:
        return main
    size, other_size = len(main), len(other)  # type: ignore[arg-type]
    total = max(size / (1 - share), other_size / share)
    return Mixed((main, other), (round(total * (1 - share)), round(total * share)))
