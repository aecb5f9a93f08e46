"""What the original keeps between decoding steps: the input of every layer, instead of keys and values.

Where the maximum of LayerNorm runs over the whole tensor (`scope: tensor`), the key of an earlier position depends on
everything that is normalised with it, so keys cannot be kept. The original stores hidden states and at every step
normalises all of them anew, in a call of their own, and recomputes keys and values. This reproduces released models
to the last id and costs what it costs; with `scope: token` nothing of it is needed (see `cache.py`).

Shapes: B batch, L new positions, S stored positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HiddenStateCache:
    """Inputs of all layers for B rows of equal length; the counterpart of `KVCache` for `scope: tensor`.

    Args:
        num_layers: number of blocks.
    """

    def __init__(self, num_layers: int) -> None:
        self._streams: list[Tensor | None] = [None] * num_layers
        self._earlier: Tensor | None = None

    def recall(self, layer: int, x_BLD: Tensor, keys_and_values: Callable[[Tensor], Tensor]) -> None:
        """Add new inputs of a layer, and compute the keys and values of the earlier ones."""
        stream_BSD = self._streams[layer]
        self._earlier = None if stream_BSD is None else keys_and_values(stream_BSD)
        self._streams[layer] = x_BLD if stream_BSD is None else torch.cat([stream_BSD, x_BLD], 1)

    def store(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the earlier and the new positions `(2, B, H, L, K)`: two of `(B, H, S + L, K)`.

        None of them is kept.
        """
        every = keys_and_values if self._earlier is None else torch.cat([self._earlier, keys_and_values], 3)
        keys_BHSK, values_BHSK = every.unbind()
        return keys_BHSK, values_BHSK

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
