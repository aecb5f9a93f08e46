"""How many bytes of activations a forward pass leaves behind for the backward one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes allocated during `forward` that are still in use when it has returned, its result included.

    What existed before (weights, inputs) does not count. Works on fake tensors, which occupy no memory.
    """
    with _Allocations() as allocations:
        result = forward()  # noqa: F841 - keeps the graph, and what it saved, alive
        return sum(storage.nbytes() for storage in allocations.storages)


class _Allocations(TorchDispatchMode):
    """Remembers the memory behind the results of all operators, for as long as it is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self._given: WeakSet[torch.UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if tensor.untyped_storage() not in self.storages:
                self._given.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.untyped_storage() not in self._given:
                self.storages.add(tensor.untyped_storage())
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
