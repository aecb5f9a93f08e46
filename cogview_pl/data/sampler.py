"""The order of training samples: endless, and the same after a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EndlessSampler(Sampler[int]):
    """Indices of a data set for ever, epoch after epoch without a seam or a dropped sample.

    The order of an epoch is a function of `seed` and the epoch's number only, not of what was drawn before,
    of the workers or of the number of processes; so "the first N samples" says exactly which, and a run goes
    on from there. Positions count the samples of the whole world, which takes W blocks of B at a time: rank r
    the positions r·B … r·B + B - 1 of them, so that with B the size of a batch the batches of all ranks, one
    behind the other, are the batch of one process. An epoch that W·B does not divide goes over into the next
    one.

    `consumed` (samples that the whole world has trained on, 0 at first) is where the next iteration starts;
    set it before `iter()`. Iterating leaves it alone, because a loader draws ahead of what has been trained
    on: who counts the finished batches keeps it up to date. There is no length.

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
