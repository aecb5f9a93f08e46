"""Static KV cache: keys and values of earlier positions, allocated once and written in place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor


class _Extent(NamedTuple):
    longest: int
    even: bool
    """Whether all rows are equally long."""


class KVCache:
    """Keys and values of every layer for B rows of at most `capacity` positions.

    Rows may have different lengths (prompts do): row b holds `lengths[b]` valid positions and the next token goes
    right behind them, over whatever padding a longer neighbour left there.

    Memory: 2 · layers · B · heads · capacity · head size · bytes per element.

    Args:
        num_layers, batch, num_heads, capacity, head_size: the sizes above.
        dtype, device: of the stored keys and values.
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
        self._layers = torch.zeros(shape, dtype=dtype, device=device).unbind()
        """Per layer keys and values `(2, B, H, C, K)`."""
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = capacity
        self._host_lengths = torch.zeros(batch, dtype=torch.long)  # the same, so that no step waits for the device
        self._extent: _Extent | None = None
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take."""
        return self._layers[0].untyped_storage().nbytes()  # the layers lie in one piece of memory

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self._layers[0].dtype

    def rows(self, part: slice) -> KVCache:
        """Some of the rows as a cache of their own, in the same memory; use either views or the whole."""
        view = copy(self)
        view._layers = tuple(layer[:, part] for layer in self._layers)
        view.lengths, view._host_lengths = self.lengths[part], self._host_lengths[part]
        view._extent = view._places = None
        return view

    def clear(self) -> None:
        """Forget what is stored."""
        self.lengths.zero_()
        self._host_lengths.zero_()
        self._extent = self._places = None

    def store(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Write L new positions `(2, B, H, L, K)` behind every row.

        Returns keys and values up to the longest row, `(B, H, S, K)`.
        """
        length = keys_and_values.shape[3]
        extent = self._new_extent()
        end = extent.longest + length
        stored_2BHCK = self._layers[layer]
        if extent.even:
            stored_2BHCK.narrow(3, extent.longest, length).copy_(keys_and_values)
        else:
            rows_B1, places_BL = self._new_places(length)
            new_BL2HK = keys_and_values.permute(1, 3, 0, 2, 4)
            stored_2BHCK.transpose(0, 1)[rows_B1, :, :, places_BL] = new_BL2HK.to(stored_2BHCK.dtype)
        keys_BHSK, values_BHSK = stored_2BHCK.narrow(3, 0, end).unbind()
        return keys_BHSK, values_BHSK

    def mask(self, length: int) -> Tensor | None:
        """Who sees whom for L new positions: bool `(B, 1, L, S)`, True where key s is not later than query l.

        None where the new positions alone decide: before anything is stored (causal), or for one new position behind
        rows that are equally long (it sees everything).
        """
        extent = self._new_extent()
        if extent.longest == 0 or (extent.even and length == 1):
            return None
        steps_L = torch.arange(length, device=self.lengths.device)
        keys_S = torch.arange(extent.longest + length, device=self.lengths.device)
        return keys_S <= (self.lengths[:, None] + steps_L)[:, None, :, None]

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Count new positions as stored: so many valid ones in each row, or in all of them."""
        new = lengths if isinstance(lengths, int) else torch.tensor(lengths)
        self.lengths += new if isinstance(new, int) else new.to(self.lengths.device)
        self._host_lengths += new
        self._extent = self._places = None

    def _new_extent(self) -> _Extent:
        """How far the rows reach; the same for all layers."""
        if self._extent is None:
            shortest, longest = self._host_lengths.aminmax()
            self._extent = _Extent(int(longest), bool(shortest == longest))
        return self._extent

    def _new_places(self, length: int) -> tuple[Tensor, Tensor]:
        """Where the next L positions of every row go; the same for all layers."""
        if self._places is None:
            device = self.lengths.device
            rows_B1 = torch.arange(len(self.lengths), device=device)[:, None]
            self._places = rows_B1, self.lengths[:, None] + torch.arange(length, device=device)
        return self._places


class StaticKVCache:
    """The rows of a `KVCache` as a CUDA graph needs them: every step is the same operations on the same memory.

    One new position at a time goes where `lengths`, on the device, says; attention runs over the first `reach`
    positions of all rows, masked behind each row's end. Nothing depends on numbers that the host knows, so the cache
    that this is made of no longer knows how long its rows are: use this in its place, or others made of it.

    Args:
        cache: holds the prompts.
        reach: positions that attention runs over; every row must stay shorter while this is used.
    """

    def __init__(self, cache: KVCache, reach: int) -> None:
        self._layers = tuple(layer.narrow(3, 0, reach) for layer in cache._layers)
        self._lengths = cache.lengths
        self._rows_B = torch.arange(len(cache.lengths), device=cache.lengths.device)
        self._reach_S = torch.arange(reach, device=cache.lengths.device)

    def store(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one new position `(2, B, H, 1, K)` behind every row; returns keys and values `(B, H, reach, K)`."""
        stored_2BHSK = self._layers[layer]
        new_B2HK = keys_and_values[:, :, :, 0].transpose(0, 1)
        stored_2BHSK.transpose(0, 1)[self._rows_B, :, :, self._lengths] = new_B2HK.to(stored_2BHSK.dtype)
        keys_BHSK, values_BHSK = stored_2BHSK.unbind()
        return keys_BHSK, values_BHSK

    def mask(self, length: int) -> Tensor:
        """What each row's new position sees: bool `(B, 1, 1, reach)`."""
        if length != 1:
            raise ValueError(f"a static cache takes one new position at a time, not {length}")
        return (self._reach_S <= self._lengths[:, None])[:, None, None]

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Count the new position of every row as stored; `lengths` is 1."""
        if lengths != 1:
            raise ValueError(f"a static cache takes one new position at a time, not {lengths}")
        self._lengths += 1
