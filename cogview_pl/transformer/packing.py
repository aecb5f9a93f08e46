"""Training sequences one after the other, without padding: the form in which compiled CPU kernels train.

Shapes: B batch, L length with padding, N positions that are kept, M positions whose hidden states are due.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PackedSequences(NamedTuple):
    """Kept positions of a batch. Attention is causal, so those after the last one due cannot change the loss."""

    kept_N: Tensor
    """int64, index of each kept position in the flattened batch `(B · L,)`."""
    starts: Tensor
    """int64 `(B + 1,)`: first row of each sequence among the kept positions, and N."""
    longest: int
    """Number of kept positions of the longest sequence."""
    due_M: Tensor
    """int64, index of each due position among the kept ones."""


def pack(due_BL: Tensor) -> PackedSequences:
    """Keep the positions of each sequence up to the last one that is due (bool)."""
    places_L = torch.arange(1, due_BL.shape[1] + 1, device=due_BL.device)
    lengths_B = (due_BL * places_L).amax(1)
    kept_N = (places_L <= lengths_B[:, None]).flatten().nonzero()[:, 0]
    starts = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
    return PackedSequences(kept_N, starts, int(lengths_B.amax()), due_BL.flatten()[kept_N].nonzero()[:, 0])
