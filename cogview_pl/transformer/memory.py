"""What the original keeps between decoding steps: the input of every layer, instead of keys and values.

Where the maximum of LayerNorm runs over the whole tensor (`scope: tensor`), the key of an earlier position depends on
everything that is normalised with it, so keys cannot be kept. The original stores hidden states and at every step
normalises all of them anew, in a call of their own, and recomputes keys and values. This reproduces released models
to the last id and costs what it costs; with `scope: token` nothing of it is needed (see `cache.py`).

Shapes: B batch, L new positions, S stored positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HiddenStateMemory:
    """Inputs of all layers for B rows of equal length; the counterpart of `KVCache` for `scope: tensor`.

    Args:
        num_layers: number of blocks.
    """

    def __init__(self, num_layers: int) -> None:
        self._streams: list[Tensor | None] = [None] * num_layers
        self._earlier: tuple[Tensor, Tensor] | None = None

    def recall(self, layer: int, x_BLD: Tensor, keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        """Add new inputs of a layer, and compute the keys and values of the earlier ones."""
        stream_BSD = self._streams[layer]
        self._earlier = None if stream_BSD is None else keys_and_values(stream_BSD)
        self._streams[layer] = x_BLD if stream_BSD is None else torch.cat([stream_BSD, x_BLD], 1)

    def store(self, layer: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the earlier and the new positions, `(B, H, S + L, K)`; keeps none of them."""
        if self._earlier is None:
            return k_BHLK, v_BHLK
        k_BHSK, v_BHSK = self._earlier
        return torch.cat([k_BHSK, k_BHLK], 2), torch.cat([v_BHSK, v_BHLK], 2)

    def mask(self, length: int) -> Tensor | None:
        """Who sees whom for L new positions: bool `(L, S + L)`, or None (causal) where nothing is stored."""
        first = self._streams[0]
        if first is None:
            return None
        stored = first.shape[1]
        return torch.ones(length, stored + length, dtype=torch.bool, device=first.device).tril(stored)

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Nothing to count: rows are equally long.

        Raises:
            ValueError: they are not; the padding of a shorter row would enter the maximum of its neighbours.
        """
        if not isinstance(lengths, int) and len(set(lengths)) > 1:
            raise ValueError("with norm_scope=tensor the rows of a batch must be equally long")
