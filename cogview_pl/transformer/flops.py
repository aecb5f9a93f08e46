"""Floating-point operations of a training batch: one formula, for `plan=true` and for the utilisation in the logs.

A multiplication and an addition are two operations. The formula counts matmuls only, and only those that the task
needs: attention over earlier positions (n² / 2, not n²), logits of tokens with a weight and over the ids of their slot,
and no recomputed activations. Padding counts, as it does in tokens per second.

Shapes: B batch, L length of the sequences (the model reads n = L - 1 tokens), D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview_pl.transformer.model import Transformer

TRAINING = 3
"""Cost of a training step in forward passes: the backward pass has one matmul for inputs and one for weights."""


def forward_flops(
    model: Transformer, weights_BL: Tensor, slots_BL: Tensor, slot_ids: Sequence[range] | None = None
) -> Tensor:
    """Operations of the forward pass and the loss of a batch; int64 scalar on the device of the batch.

        B · (n · 2 · parameters of the blocks' linear maps + layers · 2 · D · n · (n + 1)) + 2 · D · logits

    The middle term is QKᵀ and its matmul with V: 2 · D operations each for n (n + 1) / 2 pairs of positions.

    Args:
        model: the sequence model, on any device.
        weights_BL, slots_BL, slot_ids: as for `sequence_loss`.
    """
    batch, positions = weights_BL.shape[0], weights_BL.shape[1] - 1
    hidden_size = model.token_embedding.embedding_dim
    linear = sum(matrix.numel() for matrix in model.parameter_groups().matrices)
    attention = len(model.blocks) * 2 * hidden_size * positions * (positions + 1)
    return batch * (2 * linear * positions + attention) + _head_flops(model, weights_BL, slots_BL, slot_ids)


def training_flops(
    model: Transformer, weights_BL: Tensor, slots_BL: Tensor, slot_ids: Sequence[range] | None = None
) -> Tensor:
    """Operations of a training step: `TRAINING` forward passes minus the matmuls for frozen weights.

    Arguments and result as for `forward_flops`.
    """
    batch, positions = weights_BL.shape[0], weights_BL.shape[1] - 1
    frozen = sum(matrix.numel() for matrix in model.parameter_groups().matrices if not matrix.requires_grad)
    total = TRAINING * forward_flops(model, weights_BL, slots_BL, slot_ids) - batch * 2 * frozen * positions
    if not any(parameter.requires_grad for parameter in model.token_embedding.parameters()):
        total = total - _head_flops(model, weights_BL, slots_BL, slot_ids)
    return total


def _head_flops(model: Transformer, weights_BL: Tensor, slots_BL: Tensor, slot_ids: Sequence[range] | None) -> Tensor:
    vocab_size, hidden_size = model.token_embedding.num_embeddings, model.token_embedding.embedding_dim
    due, slots = weights_BL[:, 1:] > 0, slots_BL[:, 1:]
    logits = due.sum() * vocab_size
    if slot_ids is not None:
        logits = sum(((due & (slots == slot)).sum() * len(ids) for slot, ids in enumerate(slot_ids)), due.new_zeros(()))
    return 2 * hidden_size * logits.to(torch.int64)
