"""Copies of checkpoints in main memory: training goes on, and a thread writes the copy."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from cogview_pl.lit.lightning_internals import tree_leaves

_ALIGNMENT = 64  # bytes, as torch's own allocator


def num_bytes(checkpoint: dict[str, Any]) -> int:
    """Bytes of the tensors in a checkpoint; tensors that share memory count once."""
    others = (leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor) and not _is_plain(leaf))
    return sum(storage.nbytes() for storage in _storages(checkpoint).values()) + sum(leaf.nbytes for leaf in others)


class Snapshots:
    """Copies checkpoints into the memory of the copy before, which must not be in use any more.

    Fresh memory takes several times as long, because the system clears each page before it is written. The memory is
    shared with data workers, which may start while a copy is written: otherwise they would keep the pages of that copy.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def copy(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """An equal checkpoint in main memory; tensors that share memory do so in the copy, so its file is the same."""
        storages = _storages(checkpoint)
        places = list(accumulate((_aligned(storage.nbytes()) for storage in storages.values()), initial=0))
        if self._memory is None or len(self._memory) < places[-1]:
            self._memory = mmap.mmap(-1, max(places[-1], 1))
        copies = {
            address: _copied(storage, self._memory, place)
            for (address, storage), place in zip(storages.items(), places, strict=False)
        }
        known: dict[int, Any] = {}
        for leaf in tree_leaves(checkpoint):
            if isinstance(leaf, Tensor) and _is_plain(leaf):
                twin = torch.empty(0, dtype=leaf.dtype)
                storage = copies[leaf.untyped_storage().data_ptr()]
                known[id(leaf)] = twin.set_(storage, leaf.storage_offset(), leaf.size(), leaf.stride())  # type: ignore[call-overload]
            elif (
                isinstance(leaf, Tensor) and leaf.device.type != "cpu"
            ):  # of a class of its own, as torchao's in 8 bits
                known[id(leaf)] = leaf.detach().cpu()
        return copy.deepcopy(checkpoint, known)

    def clear(self) -> None:
        """Free the memory."""
        self._memory = None


def _storages(checkpoint: dict[str, Any]) -> dict[int, UntypedStorage]:
    """Memory of the plain tensors, by address."""
    leaves: Iterator[Any] = (leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor) and _is_plain(leaf))
    storages = (leaf.untyped_storage() for leaf in leaves)
    return {storage.data_ptr(): storage for storage in storages}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a view of a storage, and nothing more."""
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.requires_grad


def _copied(storage: UntypedStorage, memory: mmap.mmap, place: int) -> UntypedStorage:
    size = storage.nbytes()
    if not size:
        return UntypedStorage(0)
    target = torch.frombuffer(memory, dtype=torch.uint8, offset=place, count=size).untyped_storage()
    return target.copy_(storage)  # type: ignore[no-any-return]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
