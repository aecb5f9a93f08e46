"""Cross-entropy of the next token, weighted per slot of the layout (paper §2.2).

Shapes: B batch, L length, N predicted positions, V vocabulary, D width, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_pl.linear import product
from cogview_pl.transformer.model import Transformer

_SMALLEST_WEIGHT = 1e-9  # a batch in which no token carries loss has loss 0
_ROWS_ON_CPU, _ROWS_ON_DEVICE = 256, 2048  # logits made at once: few stay in the cache, many fill a device


class SequenceLoss(NamedTuple):
    """Sums rather than means, so that they add up over batches and devices."""

    loss: Tensor
    """sum(weight · cross-entropy) / sum(weight), what training minimises; scalar."""
    weight: Tensor
    """sum(weight), scalar."""
    slot_sums_S: Tensor
    """Per slot, the sum of the unweighted cross-entropies (nats)."""
    slot_counts_S: Tensor
    """Per slot, the number of predicted tokens."""


def sequence_loss(
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    weights: Tensor,
    slots: Tensor,
    num_slots: int,
    slot_ids: Sequence[range] | None = None,
    inputs: Tensor | None = None,
) -> SequenceLoss:
    """Next-token loss of a batch; logits are computed only where a loss is due.

    Args:
        model: the sequence model.
        tokens, positions, slots: int64 `(B, L)`; `slots` holds -1 outside the slots.
        weights: float `(B, L)`, weight of each token as a prediction target.
        num_slots: number of slots of the layout.
        slot_ids: per slot the ids that its tokens are predicted among, for which alone logits are computed; every
            token with a weight must lie in a slot then. None: all of the vocabulary, as in the original.
        inputs: int64 `(B, L)`, what the model reads in place of the tokens that it is to predict; None: the same.
    """
    hidden = model.hidden((tokens if inputs is None else inputs)[:, :-1], positions[:, :-1])
    targets, weights, slots = tokens[:, 1:], weights[:, 1:].float(), slots[:, 1:]
    due = weights > 0
    hidden_ND, targets_N, weights_N, slots_N = hidden[due], targets[due], weights[due], slots[due]
    counts_S = torch.bincount(slots_N, minlength=num_slots)
    head_VD = model.token_embedding.weight
    groups: list[tuple[Any, range]] = [(slice(None), range(len(head_VD)))]
    if slot_ids is not None:
        groups = [(slots_N == slot, ids) for slot, ids in enumerate(slot_ids)]
    # fp32 even where a trainer has made bf16 the default
    total, sums_S = weights.new_zeros(()), weights.new_zeros(num_slots)
    for rows, ids in groups:
        part, entropies = linear_cross_entropy(
            hidden_ND[rows], head_VD[ids.start : ids.stop], targets_N[rows] - ids.start, weights_N[rows]
        )
        total = total + part
        sums_S.index_add_(0, slots_N[rows], entropies)
    weight = weights_N.sum()
    return SequenceLoss(total / weight.clamp(min=_SMALLEST_WEIGHT), weight, sums_S, counts_S)


def over_devices(own: SequenceLoss, total: Callable[[Tensor], Tensor], devices: int) -> SequenceLoss:
    """The loss of the batches of all devices, as if they were one.

    `loss` has the value for all of them; its gradients, averaged over the devices, are those of that value. (The mean
    of the devices' own losses is another number where they have unequal numbers of tokens.)

    Args:
        own: of this device.
        total: sums a tensor over devices.
        devices: how many of them there are.
    """
    numbers = torch.stack([(own.loss * own.weight).detach(), own.weight])
    sums = total(torch.cat([numbers, own.slot_sums_S, own.slot_counts_S]).double())
    loss_sum, weight, slots = sums[0], sums[1].clamp(min=_SMALLEST_WEIGHT), sums[2:].view(2, -1)
    share = own.loss * (devices * own.weight / weight).to(own.loss.dtype)
    value = (loss_sum / weight).to(own.loss.dtype)
    return SequenceLoss(share + (value - share).detach(), weight, slots[0].float(), slots[1])


def linear_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the logits hidden · headᵀ, which never exist as a whole.

    Logits are made for some rows at a time; from them come the loss and, at once, the gradients, in the memory of
    those rows instead of N · V. Products run in the precision of autocast, the softmax in fp32.

    Args:
        hidden_ND, head_VD: float; gradients flow to these two.
        targets_N: int64 ids below V.
        weights_N: float32, at least 0.
        rows: logits made at once; None: as many as the device does well with.

    Returns:
        sum(weight · cross-entropy), a scalar; and the cross-entropies `(N,)` in nats, without a gradient. fp32.
    """
    rows = rows or rows_at_once(hidden_ND.device.type)
    return _LinearCrossEntropy.apply(hidden_ND, head_VD, targets_N, weights_N, rows)  # type: ignore[no-any-return]


def rows_at_once(device: str) -> int:
    """Rows of logits that a type of device (`cpu`, `cuda`) makes at once."""
    return _ROWS_ON_CPU if device == "cpu" else _ROWS_ON_DEVICE


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_ND.dtype
        train_hidden, train_head = ctx.needs_input_grad[:2]
        hidden, head = hidden_ND.detach().to(dtype), head_VD.detach().to(dtype)
        hidden_grad = torch.empty_like(hidden) if train_hidden else None
        head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if train_head else None
        entropies = []
        with torch.autocast(device, enabled=False):
            for some in range(0, len(targets_N), rows):
                part = slice(some, some + rows)
                targets, weights = targets_N[part, None], weights_N[part, None].float()
                logits = product(hidden[part], head).float()
                at_target = logits.gather(1, targets)
                maximum = logits.amax(1, keepdim=True)
                exponentials = logits.sub_(maximum).exp_()  # in place: they are large
                normaliser = exponentials.sum(1, keepdim=True)
                entropies.append((normaliser.log() + maximum - at_target)[:, 0])
                if hidden_grad is None and head_grad is None:
                    continue
                # d(weight · cross-entropy) / d(logits) = weight · (softmax - one-hot)
                slope = exponentials.mul_(weights / normaliser).scatter_add_(1, targets, -weights).to(dtype)
                if hidden_grad is not None:
                    hidden_grad[part] = product(slope, head.T)
                if head_grad is not None and dtype == torch.float32:
                    head_grad.addmm_(slope.T, hidden[part])
                elif head_grad is not None:
                    head_grad += slope.T @ hidden[part]
        entropy_N = torch.cat(entropies) if entropies else weights_N.new_zeros(0)
        ctx.mark_non_differentiable(entropy_N)
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        return (weights_N * entropy_N).sum(), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, head_grad = (
            None if gradient is None else (gradient.float() * slope).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return hidden_grad, head_grad, None, None, None
