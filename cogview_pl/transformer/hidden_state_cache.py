"""The original's cache: the input of every layer instead of keys and values.

Where the maximum of LayerNorm runs over the whole tensor (`norm_scope: tensor`), the key of an earlier position depends
on everything that is normalised together with it, so keys cannot be kept. The original stores hidden states, normalises
all of them again at every step, in a call of their own, and computes keys and values from them. This class does the
same, so that released models give the original's ids. With `norm_scope: token` a `KVCache` serves.

Shapes: B batch, L new positions, S stored positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HiddenStateCache:
    """Inputs of all layers for B rows of equal length; takes the place of `KVCache` with `norm_scope: tensor`.

    Args:
        num_layers: number of blocks.
    """

    def __init__(self, num_layers: int) -> None:
        self._streams: list[Tensor | None] = [None] * num_layers
        self._earlier: Tensor | None = None

    def recall(self, layer: int, x_BLD: Tensor, keys_and_values: Callable[[Tensor], Tensor]) -> None:
        """Store new inputs `(B, L, D)` of a layer, and compute the keys and values of the earlier ones."""
        stream_BSD = self._streams[layer]
        self._earlier = None if stream_BSD is None else keys_and_values(stream_BSD)
        self._streams[layer] = x_BLD if stream_BSD is None else torch.cat([stream_BSD, x_BLD], 1)

    def store(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, S + L, K)` of earlier and new positions; those of the new are `(2, B, H, L, K)`."""
        every = keys_and_values if self._earlier is None else torch.cat([self._earlier, keys_and_values], 3)
        keys_BHSK, values_BHSK = every.unbind()
        return keys_BHSK, values_BHSK

    def mask(self, length: int) -> Tensor | None:
        """Attention mask of L new positions: bool `(L, S + L)`, or None (causal) while nothing is stored."""
        first = self._streams[0]
        if first is None:
            return None
        stored = first.shape[1]
        return torch.ones(length, stored + length, dtype=torch.bool, device=first.device).tril(stored)

    def advance(self, lengths: Sequence[int] | int) -> None:
        """Counts nothing, since `store` appends to all rows.

        Raises:
            ValueError: rows differ in length; the padding of a shorter row would enter the maximum of LayerNorm.
        """
        if not isinstance(lengths, int) and len(set(lengths)) > 1:
            raise ValueError("with norm_scope=tensor the rows of a batch must be equally long")
