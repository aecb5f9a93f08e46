"""Static KV cache: keys and values of earlier positions, allocated once and written in place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor


class _Step(NamedTuple):
    """Places of the L new positions of a pass, the same for all layers."""

    length: int
    """L."""
    longest: int
    """Stored positions of the longest row."""
    places: tuple[Tensor, Tensor] | None
    """Indices of rows `(B, 1)` and positions `(B, L)` to write; None if all rows are equally long."""
    new: tuple[Tensor, ...]
    """Per layer, the memory to write if all rows are equally long: `(2, B, H, L, K)`."""
    seen: tuple[tuple[Tensor, Tensor], ...]
    """Per layer, keys and values up to the end of the longest row: `(B, H, S, K)`."""


class KVCache:
    """Keys and values of every layer for B rows of at most `capacity` positions.

    Rows may have different lengths, as prompts have: row b holds `lengths[b]` valid positions, and its next token is
    written at the position `lengths[b]`, over the padding that a longer row left there.

    Memory: 2 · layers · B · heads · capacity · head size · bytes per element.

    Args:
        num_layers, batch, num_heads, capacity, head_size: the sizes above.
        dtype, device: those of the stored keys and values.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        num_heads: int,
        capacity: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, batch, num_heads, capacity, head_size)
        self._stored = torch.zeros(shape, dtype=dtype, device=device)
        """Keys and values `(layers, 2, B, H, C, K)`."""
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = capacity
        self._host_lengths = torch.zeros(batch, dtype=torch.long)  # a copy, so that no step waits for the device
        self._step: _Step | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self._stored.untyped_storage().nbytes()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of keys and values."""
        return self._stored.dtype

    @property
    def stored(self) -> Tensor:
        """Keys and values `(layers, 2, B, H, C, K)`; row b holds `lengths[b]` valid positions."""
        return self._stored

    def rows(self, part: slice) -> KVCache:
        """Some of the rows as a cache of their own on the same memory; use either such caches or this one."""
        view = copy(self)
        view._stored = self._stored[:, :, part]
        view.lengths, view._host_lengths = self.lengths[part], self._host_lengths[part]
        view._step = None
        return view

    def clear(self) -> None:
        """Forget all positions."""
        self.lengths.zero_()
        self._host_lengths.zero_()
        self._step = None

    def store(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Write L new positions `(2, B, H, L, K)` at the end of every row.

        Returns keys and values up to the end of the longest row, `(B, H, S, K)`.
        """
        step = self._next(keys_and_values.shape[3])
        if step.places is None:
            step.new[layer].copy_(keys_and_values)
        else:
            rows_B1, places_BL = step.places
            new_BL2HK = keys_and_values.permute(1, 3, 0, 2, 4)
            stored_2BHCK = self._stored[layer]
            stored_2BHCK.transpose(0, 1)[rows_B1, :, :, places_BL] = new_BL2HK.to(stored_2BHCK.dtype)
        return step.seen[layer]

    def mask(self, length: int) -> Tensor | None:
        """Attention mask of L new positions: bool `(B, 1, L, S)`, True where key s is not later than query l.

        None where no mask is needed: in an empty cache (causal attention), or for one new position of rows that are
        equally long (it sees all keys).
        """
        step = self._next(length)
        if step.longest == 0 or (step.places is None and length == 1):
            return None
        steps_L = torch.arange(length, device=self.lengths.device)
        keys_S = torch.arange(step.longest + length, device=self.lengths.device)
        return keys_S <= (self.lengths[:, None] + steps_L)[:, None, :, None]

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Count new positions as valid: one number for all rows, or one for each row."""
        if not isinstance(lengths, int) and len(set(lengths)) == 1:
            lengths = lengths[0]  # the host would wait for the copy of a tensor to the device
        new = lengths if isinstance(lengths, int) else torch.tensor(lengths)
        self.lengths += new if isinstance(new, int) else new.to(self.lengths.device)
        self._host_lengths += new
        self._step = None

    def _next(self, length: int) -> _Step:
        """Places of the next L positions; the views of all layers are made at once."""
        if self._step is None or self._step.length != length:
            shortest, longest = map(int, self._host_lengths.aminmax())
            places = None if shortest == longest else self._places(length)
            new = self._stored.narrow(4, longest, length).unbind()
            every = self._stored.narrow(4, 0, longest + length)
            views = every.view(-1, *every.shape[2:]).unbind()  # keys and values in turn
            seen = tuple(zip(views[::2], views[1::2], strict=True))
            self._step = _Step(length, longest, places, new, seen)
        return self._step

    def _places(self, length: int) -> tuple[Tensor, Tensor]:
        """Indices of rows and positions of the next L positions."""
        device = self.lengths.device
        rows_B1 = torch.arange(len(self.lengths), device=device)[:, None]
        return rows_B1, self.lengths[:, None] + torch.arange(length, device=device)


class StaticKVCache:
    """The rows of a `KVCache` for CUDA graphs: every step does the same operations on the same memory.

    A step writes one position per row, at the index that `lengths`, on the device, gives. Attention runs over the first
    `reach` positions of all rows, with a mask from the end of each row on. The host does not count these steps, so the
    `KVCache` must not be used any more, only caches of this class that were made of it.

    Args:
        cache: holds the prompts.
        reach: positions that attention runs over; every row must stay shorter while this is used.
    """

    def __init__(self, cache: KVCache, reach: int) -> None:
        self._layers = cache._stored.narrow(4, 0, reach).unbind()
        self.lengths = cache.lengths
        self._rows_B = torch.arange(len(cache.lengths), device=cache.lengths.device)
        _, _, batch, heads, *_ = cache._stored.shape
        self.arrived = torch.zeros(batch * heads, dtype=torch.int32, device=cache.lengths.device)
        """Counters of the attention kernel, 0 between steps."""
        self._reach_S = torch.arange(reach, device=cache.lengths.device)

    def store(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new position `(2, B, H, 1, K)` at the end of each row; returns keys, values `(B, H, reach, K)`."""
        stored_2BHSK = self._layers[layer]
        new_B2HK = keys_and_values[:, :, :, 0].transpose(0, 1)
        stored_2BHSK.transpose(0, 1)[self._rows_B, :, :, self.lengths] = new_B2HK.to(stored_2BHSK.dtype)
        return self.keys_and_values(layer)

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, reach, K)`."""
        keys_BHSK, values_BHSK = self._layers[layer].unbind()
        return keys_BHSK, values_BHSK

    def mask(self, length: int) -> Tensor:
        """Attention mask of each row's new position: bool `(B, 1, 1, reach)`; raises ValueError for L other than 1."""
        if length != 1:
            raise ValueError(f"a static cache takes one new position at a time, not {length}")
        return (self._reach_S <= self.lengths[:, None])[:, None, None]

    def advance(self, lengths: Tensor | int) -> None:
        """Count new positions as valid: 1 in all rows, or int64 `(B,)` with 0 or 1 per row."""
        self.lengths += lengths
