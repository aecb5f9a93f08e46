"""Bytes of the tensors that are alive while code runs, and their peak; for estimates and for measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts memory that operators allocate while this mode is active, until it is freed.

    Real and fake tensors count alike. Memory that an operator frees itself (workspace of a convolution) does not count.
    Memory has the label that was set when it was allocated.

    Args:
        label: the first label.
        given: also count memory that operators read and did not allocate, such as weights from a file.

    Attributes:
        now: bytes alive, by label.
        peak: `now` when the sum was largest since the last `restart`.
    """

    def __init__(self, label: str = "activations", *, given: bool = False) -> None:
        super().__init__()
        self._count_given = given
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._label = label
        self._known: dict[int, tuple[Any, str, int]] = {}  # by address: weak reference, label, bytes

    @property
    def highest(self) -> int:
        """Bytes of `peak`, all labels."""
        return self.peak.total()

    @property
    def total(self) -> int:
        """Bytes of `now`, all labels."""
        return self.now.total()

    def restart(self) -> Counter[str]:
        """The peak since the last restart; a new peak starts at the bytes that are alive now."""
        peak, self.peak = self.peak, self.now.copy()
        return peak

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Memory that is allocated inside has this label."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def claim(self, tensor: Tensor, name: str) -> None:
        """Give the memory of a tensor another label."""
        address = _address(tensor)
        if address in self._known:
            reference, label, size = self._known[address]
            self._known[address] = reference, name, size
            self.now[label] -= size
            self.now[name] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of what runs on fake tensors
            return func(*args)
        if self._count_given:
            for tensor in plain_tensors((args, kwargs)):
                self._add(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in plain_tensors(result):
            if _address(tensor) in self._known:
                continue
            if all(_address(other) != _address(tensor) for other in plain_tensors((args, kwargs))):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._known:
            return
        opaque = tensor.is_mkldnn
        memory = tensor if opaque else tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size() if opaque else tensor.untyped_storage().nbytes()
        self._known[address] = ref(memory, lambda _: self._drop(address)), self._label, size
        self.now[self._label] += size
        if self.total > self.highest:
            self.peak = self.now.copy()

    def _drop(self, address: int) -> None:
        _, label, size = self._known.pop(address)
        self.now[label] -= size


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of floating-point tensors that are made inside without a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _address(tensor: Tensor) -> int:
    """Identifies a tensor's memory; oneDNN tensors have no storage."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def plain_tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors in nested containers; of a wrapper (8-bit optimizer state, quantized weights) the inner ones."""
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, Tensor) or leaf.device.type == "meta":
            continue
        if hasattr(leaf, "__tensor_flatten__"):
            yield from plain_tensors([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        else:
            yield leaf
