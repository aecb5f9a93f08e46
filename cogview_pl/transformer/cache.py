"""Static KV cache: keys and values of earlier positions, allocated once and written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        shape = (num_layers, batch, num_heads, capacity, head_size)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.capacity = capacity
        self._extent = 0  # no row is longer; known on the host, so that no step waits for the device
        self._even = True  # all rows are equally long
        self._places: tuple[Tensor, Tensor] | None = None

    def store(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Write L new positions behind every row; returns keys and values up to the longest row, `(B, H, S, K)`."""
        length = k_BHLK.shape[2]
        end = self._extent + length
        keys_BHCK, values_BHCK = self._keys[layer], self._values[layer]
        if self._even:
            keys_BHCK[:, :, self._extent : end] = k_BHLK
            values_BHCK[:, :, self._extent : end] = v_BHLK
        else:
            rows_B1, places_BL = self._new_places(length)
            keys_BHCK[rows_B1, :, places_BL] = k_BHLK.transpose(1, 2).to(self._keys.dtype)
            values_BHCK[rows_B1, :, places_BL] = v_BHLK.transpose(1, 2).to(self._values.dtype)
        return keys_BHCK[:, :, :end], values_BHCK[:, :, :end]

    def mask(self, length: int) -> Tensor | None:
        """Who sees whom for L new positions: bool `(B, 1, L, S)`, True where key s is not later than query l.

        None where the new positions alone decide: before anything is stored (causal), or for one new position behind
        rows that are equally long (it sees everything).
        """
        if self._extent == 0 or (self._even and length == 1):
            return None
        steps_L = torch.arange(length, device=self.lengths.device)
        keys_S = torch.arange(self._extent + length, device=self.lengths.device)
        return keys_S <= (self.lengths[:, None] + steps_L)[:, None, :, None]

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Count new positions as stored: so many valid ones in each row, or in all of them."""
        if isinstance(lengths, int):
            self.lengths += lengths
            self._extent += lengths
        else:
            self.lengths += torch.tensor(lengths, device=self.lengths.device)
            self._extent += max(lengths)
            self._even = self._even and len(set(lengths)) == 1
        self._places = None

    def _new_places(self, length: int) -> tuple[Tensor, Tensor]:
        """Where the next L positions of every row go; the same for all layers."""
        if self._places is None:
            device = self.lengths.device
            rows_B1 = torch.arange(len(self.lengths), device=device)[:, None]
            self._places = rows_B1, self.lengths[:, None] + torch.arange(length, device=device)
        return self._places
