"""Training sets that mix two data sets, each with a share of the samples."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset

T = TypeVar("T")


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
    return ConcatDataset([_cycled(main, size, total * (1 - share)), _cycled(other, other_size, total * share)])


def sample_key(dataset: Dataset[Any], index: int) -> str:
    """The name of a sample of a data set, or of a mixed one, in a message."""
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, index)
        return sample_key(dataset.datasets[part], index - ([0, *dataset.cumulative_sizes][part]))
    if isinstance(dataset, Subset):
        return sample_key(dataset.dataset, int(dataset.indices[index]))
    return str(dataset.key(index))  # type: ignore[attr-defined]


def _cycled(dataset: Dataset[T], size: int, count: float) -> Dataset[T]:
    return Subset(dataset, np.arange(round(count)) % size)  # type: ignore[arg-type]
