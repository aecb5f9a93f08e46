"""Cross-entropy of the next token, weighted per slot of the layout (paper §2.2).

Shapes: B batch, L length, N predicted positions, S slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.transformer.model import Transformer

_SMALLEST_WEIGHT = 1e-9  # a batch in which no token carries loss has loss 0


class SequenceLoss(NamedTuple):
    """Sums rather than means, so that they add up over batches and devices."""

    loss: Tensor
    """sum(weight · cross-entropy) / sum(weight), what training minimises; scalar."""
    slot_sums_S: Tensor
    """Per slot, the sum of the unweighted cross-entropies (nats)."""
    slot_counts_S: Tensor
    """Per slot, the number of predicted tokens."""


def sequence_loss(
    model: Transformer, tokens: Tensor, positions: Tensor, weights: Tensor, slots: Tensor, num_slots: int
) -> SequenceLoss:
    """Next-token loss of a batch; logits are computed only where a loss is due.

    Args:
        model: the sequence model.
        tokens, positions, slots: int64 `(B, L)`; `slots` holds -1 outside the slots.
        weights: float `(B, L)`, weight of each token as a prediction target.
        num_slots: number of slots of the layout.
    """
    hidden = model.hidden(tokens[:, :-1], positions[:, :-1])
    targets, weights, slots = tokens[:, 1:], weights[:, 1:], slots[:, 1:]
    due = weights > 0
    logits = model.logits(hidden[due]).float()
    weights_N, slots_N = weights[due], slots[due]
    entropy_N = F.cross_entropy(logits, targets[due], reduction="none")
    counts_S = torch.bincount(slots_N, minlength=num_slots)
    sums_S = torch.zeros(num_slots, device=tokens.device).index_add_(0, slots_N, entropy_N.detach())
    loss = (weights_N * entropy_N).sum() / weights_N.sum().clamp(min=_SMALLEST_WEIGHT)
    return SequenceLoss(loss, sums_S, counts_S)
