"""The order of training samples: endless, and the same in a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
    """

    def __init__(
        self, size: int, seed: int, shuffle: bool = True, rank: int = 0, world_size: int = 1, block: int = 1
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.block = block
        self.consumed = 0

    def __iter__(self) -> Iterator[int]:
        return self._from(self.consumed)

    def _from(self, position: int) -> Iterator[int]:
        order, known = torch.empty(0), -1
        while True:
            for place in range(position + self.rank * self.block, position + (self.rank + 1) * self.block):
                epoch, index = divmod(place, self.size)
                if epoch != known:
                    order, known = self._order(epoch), epoch
                yield int(order[index])
            position += self.world_size * self.block

    def _order(self, epoch: int) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        # A hash, so that seed 0 epoch 1 and seed 1 epoch 0 have nothing in common.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(self.size, generator=generator)
