"""The order of training samples: endless, and the same in a resumed run; and that of validation samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from cogview_pl.data.permutation import Permutation

ORDER = 2
"""Version of the order of an epoch: 1 is a table by `torch.randperm`, of 8 bytes a sample; 2 is a `Permutation`."""
ORDERS = (1, 2)
_AT_ONCE = 256  # places whose samples are computed at once, because one alone costs nearly as much


class EndlessSampler(Sampler[int]):
    """Endless indices of a data set, epoch after epoch; no sample is dropped between epochs.

    The order of an epoch depends on `seed` and the number of the epoch only, not on workers or the number of processes.
    So the first N samples are always the same, and a run can be resumed after them. Positions count the samples of all
    W ranks, which take W blocks of B samples at a time; rank r takes the positions r·B … r·B + B - 1 of them. If B is
    the batch size, the batches of all ranks together are the batch of one process. If W·B does not divide the size, a
    batch holds samples of two epochs.

    `consumed` (number of samples that all ranks have trained on, 0 at first) is where the next iteration starts; set it
    before `iter()`. Iterating does not change it, because a loader reads ahead of training; the code that counts
    finished batches must update it. There is no length.

    Args:
        size: samples in the data set, at least 1.
        seed: of the order.
        shuffle: False keeps the order of the data set in each epoch.
        rank, world_size: this process among those that share the data.
        block: samples that a rank takes at a time.
        order: one of `ORDERS`.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        block: int = 1,
        order: int = ORDER,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, not {order}")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.block = block
        self.order = order
        self.consumed = 0
        self._table: tuple[int, NDArray[np.int64]] | None = None  # of order 1: number of an epoch and its samples

    def __iter__(self) -> Iterator[int]:
        return self._from(self.consumed)

    def _from(self, position: int) -> Iterator[int]:
        blocks = -(-min(_AT_ONCE, self.size) // self.block)
        step = self.world_size * self.block
        own = np.arange(blocks)[:, None] * step + self.rank * self.block + np.arange(self.block)
        while True:
            yield from self._samples(position + own.ravel())
            position += blocks * step

    def _samples(self, places: NDArray[np.int64]) -> list[int]:
        """Samples at places, which are counted from the first epoch on."""
        epochs, indices = np.divmod(places, self.size)
        found: list[int] = []
        for epoch in np.unique(epochs):  # places ascend
            found += self._epoch(int(epoch), indices[epochs == epoch]).tolist()
        return found

    def _epoch(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self.shuffle:
            return indices
        if self.order == 1:
            return self._epoch_by_table(epoch, indices)
        # Both numbers, so that seed 0 epoch 1 and seed 1 epoch 0 have nothing in common.
        return Permutation(self.size, f"{self.seed} {epoch}").of(indices)

    def _epoch_by_table(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._table is None or self._table[0] != epoch:
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self._table = epoch, torch.randperm(self.size, generator=generator).numpy()
        return self._table[1][indices]


def at_equal_distances(size: int, most: int | None) -> Sequence[int]:
    """At most `most` of the samples 0 … size - 1, at equal distances; None: all.

    A file may hold samples in any order, so the first ones could be of one kind.
    """
    count = size if most is None else min(most, size)
    return range(size) if count == size else [number * size // count for number in range(count)]


class BatchesInOrder:
    """Batches of samples, in order; rank r of W takes the samples r, r + W, r + 2·W, …, counted from 0.

    All ranks get the same number of batches; the last one may be empty.

    Args:
        samples: indices into a data set.
        batch_size: samples of a batch of each rank.
        rank, world_size: this process among those that share the data.
    """

    def __init__(self, samples: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self._own = samples[rank::world_size]
        self._starts = range(0, -(-len(samples) // world_size), batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Sequence[int]]:
        return (self._own[start : start + self._starts.step] for start in self._starts)
