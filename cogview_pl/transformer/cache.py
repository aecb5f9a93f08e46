"""Static KV cache: keys and values of earlier positions, allocated once and written in place."""

from __future__ import annotations

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

    def store(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Write L new positions behind every row; returns keys and values up to the longest row, `(B, H, S, K)`."""
        batch, _, length, _ = k_BHLK.shape
        rows_B1 = torch.arange(batch, device=k_BHLK.device)[:, None]
        places_BL = self.lengths[:, None] + torch.arange(length, device=k_BHLK.device)
        self._keys[layer][rows_B1, :, places_BL] = k_BHLK.transpose(1, 2).to(self._keys.dtype)
        self._values[layer][rows_B1, :, places_BL] = v_BHLK.transpose(1, 2).to(self._values.dtype)
        end = self._extent + length
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def mask(self, length: int) -> Tensor:
        """Who sees whom for L new positions: bool `(B, 1, L, S)`, True where key s is not later than query l."""
        steps_L = torch.arange(length, device=self.lengths.device)
        keys_S = torch.arange(self._extent + length, device=self.lengths.device)
        return keys_S <= (self.lengths[:, None] + steps_L)[:, None, :, None]

    def advance(self, lengths_B: Tensor | int, extent: int) -> None:
        """Count new positions as stored: `lengths_B` valid ones per row, at most `extent` in any row."""
        self.lengths += lengths_B
        self._extent += extent
