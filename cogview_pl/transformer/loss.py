"""Cross-entropy of the next token, weighted per slot of the layout (paper §2.2).

Shapes: B batch, L length, N predicted positions, V vocabulary, D hidden size, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogview_pl.kernels.availability import FUSED_SUMS, current, runs_kernels, widest_float
from cogview_pl.kernels.cpu_linear import matmul
from cogview_pl.transformer.model import Transformer

_SMALLEST_WEIGHT = 1e-9  # gives a batch without weighted tokens the loss 0
_ROWS_ON_DEVICE = 4096  # rows of logits at once on a GPU; they fill it
_ROWS_IN_FP32 = 256  # rows that a GPU copies to fp32 at once where the kernel does not run
_ROWS_ON_CPU_IN_FP32 = 256  # rows of logits at once on a CPU
_ROWS_ON_CPU = 1536  # the same in less than fp32, where each update of the lm_head's gradient needs a cast
_IN_CACHE = 2**20  # fp32 logits that stay in a CPU's cache for several passes
_IDS_OF_KERNEL, _WARPS_OF_KERNEL = 2048, 8  # block and warps of the kernel's program for one row
_IDS_IN_CACHE = 2048  # rows of the lm_head's gradient that stay in a CPU's cache for matmul, cast and sum


class SequenceLoss(NamedTuple):
    """Loss and sums per slot; sums add up over batches and devices."""

    loss: Tensor
    """sum(weight · cross-entropy) / sum(weight), the objective of training; scalar."""
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
    """Next-token loss of a batch; logits are computed only for tokens with a weight.

    Args:
        model: the sequence model.
        tokens, positions, slots: int64 `(B, L)`; `slots` holds -1 outside the slots.
        weights: float `(B, L)`, at least 0, weight of each token as a prediction target.
        num_slots: number of slots of the layout.
        slot_ids: per slot the ids that compete in the softmax; every token with a weight must then lie in a slot.
            None: the whole vocabulary, as in the original program.
        inputs: int64 `(B, L)`, input ids of the model if they differ from the targets (token noise); None: `tokens`.
    """
    targets, weights, slots = tokens[:, 1:], weights[:, 1:].float(), slots[:, 1:]
    due = weights > 0
    hidden_ND = model.hidden_at((tokens if inputs is None else inputs)[:, :-1], positions[:, :-1], due)
    targets_N, weights_N, slots_N = targets[due], weights[due], slots[due]
    counts_S = torch.bincount(slots_N, minlength=num_slots)
    lm_head_VD = model.token_embedding.weight
    groups: list[tuple[Any, range]] = [(slice(None), range(len(lm_head_VD)))]
    if slot_ids is not None:
        groups = [(slots_N == slot, ids) for slot, ids in enumerate(slot_ids)]
    # `weights` is fp32 even if a trainer has set bf16 as the default dtype.
    total, sums_S = weights.new_zeros(()), weights.new_zeros(num_slots)
    for (rows, ids), head_nD in zip(groups, rows_of(lm_head_VD, [ids for _, ids in groups]), strict=True):
        part, entropies = linear_cross_entropy(hidden_ND[rows], head_nD, targets_N[rows] - ids.start, weights_N[rows])
        total = total + part
        sums_S.index_add_(0, slots_N[rows], entropies)
    weight = weights_N.sum()
    return SequenceLoss(total / weight.clamp(min=_SMALLEST_WEIGHT), weight, sums_S, counts_S)


def over_devices(own: SequenceLoss, total: Callable[[Tensor], Tensor], devices: int) -> SequenceLoss:
    """The loss of the joined batch of all devices.

    `loss` has the value of the joined batch; the mean of its gradients over the devices is the gradient of that value.
    (The mean of the devices' own losses differs from it if their numbers of tokens differ.)

    Args:
        own: loss of this device.
        total: sums a tensor over devices.
        devices: number of devices.
    """
    numbers = torch.stack([(own.loss * own.weight).detach(), own.weight])
    sums = total(torch.cat([numbers, own.slot_sums_S, own.slot_counts_S]).to(widest_float(numbers.device)))
    loss_sum, weight, slots = sums[0], sums[1].clamp(min=_SMALLEST_WEIGHT), sums[2:].view(2, -1)
    share = own.loss * (devices * own.weight / weight).to(own.loss.dtype)
    value = (loss_sum / weight).to(own.loss.dtype)
    return SequenceLoss(share + (value - share).detach(), weight, slots[0].float(), slots[1])


def linear_cross_entropy(
    hidden_ND: Tensor, lm_head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, device: str | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the logits hidden · lm_headᵀ, without ever storing all of them.

    It computes logits, loss and gradients for a block of rows at a time, so memory is that of one block instead of
    N · V. Matmuls run in the precision of autocast, the softmax in fp32.

    Args:
        hidden_ND, lm_head_VD: float; both get gradients, the lm_head none if N is 0.
        targets_N: int64 ids below V.
        weights_N: float32, at least 0.
        device: type of device (`cpu`, `cuda`) that the size of blocks is chosen for; None: the device of the tensors.

    Returns:
        sum(weight · cross-entropy), a scalar; and the cross-entropies `(N,)` in nats, without a gradient. fp32.
        A second backward pass through the scalar raises RuntimeError.
    """
    device = device or hidden_ND.device.type
    return _LinearCrossEntropy.apply(hidden_ND, lm_head_VD, targets_N, weights_N, device)  # type: ignore[no-any-return]


def rows_of(lm_head_VD: Tensor, ranges: Sequence[range]) -> list[Tensor]:
    """Rows of some ids, one tensor for each range; ranges may overlap.

    Their gradients are written into one tensor. Those of slices would each be copied into V x D zeros, and added.
    """
    if [len(ids) for ids in ranges] == [len(lm_head_VD)]:
        return [lm_head_VD]
    return list(_Rows.apply(lm_head_VD, *ranges))


def rows_at_once(device: str, dtype: torch.dtype) -> int:
    """Rows of logits per block, for a type of device (`cpu`, `cuda`) and matmuls in this precision."""
    if device != "cpu":
        return _ROWS_ON_DEVICE
    return _ROWS_ON_CPU_IN_FP32 if dtype == torch.float32 else _ROWS_ON_CPU


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lm_head_VD: Tensor, *ranges: range) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.ranges, ctx.vocab_size = ranges, len(lm_head_VD)
        return tuple(lm_head_VD[ids.start : ids.stop] for ids in ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [(ids, gradient) for ids, gradient in zip(ctx.ranges, gradients, strict=True) if gradient is not None]
        if not found:
            return None, *(None for _ in ctx.ranges)
        first = found[0][1]
        total_VD = first.new_zeros(ctx.vocab_size, first.shape[1])
        for ids, gradient_nD in found:
            total_VD[ids.start : ids.stop] += gradient_nD
        return total_VD, *(None for _ in ctx.ranges)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, lm_head_VD: Tensor, targets_N: Tensor, weights_N: Tensor, as_on: str
    ) -> tuple[Tensor, Tensor]:
        device = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_ND.dtype
        train_hidden, train_head = ctx.needs_input_grad[:2]
        train_head = train_head and len(targets_N) > 0  # a slot without loss must not cost as much as its head
        gradients = train_hidden or train_head
        hidden, head = hidden_ND.detach().to(dtype), lm_head_VD.detach().to(dtype)
        hidden_grad = torch.empty_like(hidden) if train_hidden else None
        lm_head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if train_head else None
        rows, ids = rows_at_once(as_on, dtype), len(head)
        rows_of_softmax, ids_of_sum = (
            (max(1, _IN_CACHE // ids), _IDS_IN_CACHE) if as_on == "cpu" else (_ROWS_IN_FP32, ids)
        )
        room = None if dtype == torch.float32 else head.new_empty(min(rows, len(targets_N)), ids)
        entropies: list[Tensor] = []
        with torch.autocast(device, enabled=False):
            for some in range(0, len(targets_N), rows):
                part = slice(some, some + rows)
                logits = _logits(hidden[part], head, room)
                entropies += _entropies(logits, targets_N[part], weights_N[part], rows_of_softmax, gradients)
                if hidden_grad is not None:
                    hidden_grad[part] = matmul(logits, head.T)
                if lm_head_grad is not None:
                    _add_matmul(lm_head_grad, logits, hidden[part], ids_of_sum)
                del logits  # before the next block allocates its own
        entropy_N = torch.cat(entropies) if entropies else weights_N.new_zeros(0)
        ctx.mark_non_differentiable(entropy_N)
        ctx.gradients = hidden_grad, lm_head_grad
        ctx.dtypes = hidden_ND.dtype, lm_head_VD.dtype
        return (weights_N * entropy_N).sum(), entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy has freed its gradients; compute the loss again")
        # In place: all activations exist at this moment, and the lm_head's gradient is as large as the lm_head.
        hidden_grad, lm_head_grad = (
            None if own is None else own.mul_(gradient).to(dtype)
            for own, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return hidden_grad, lm_head_grad, None, None, None


def _logits(hidden_RD: Tensor, lm_head_VD: Tensor, room_RV: Tensor | None) -> Tensor:
    """Logits, written into `room_RV` because new memory costs a process time; oneDNN allocates its own in fp32."""
    if room_RV is None:
        return matmul(hidden_RD, lm_head_VD)
    return torch.mm(hidden_RD, lm_head_VD.T, out=room_RV[: len(hidden_RD)])


def _entropies(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor, rows: int, gradients: bool) -> list[Tensor]:
    """Cross-entropies in fp32, `rows` at a time; with `gradients`, the gradient overwrites the logits."""
    if runs_kernels(logits_RV.device):
        return [_entropies_by_kernel(logits_RV, targets_R, weights_R, gradients)]
    entropies = []
    room = None
    if logits_RV.dtype != torch.float32:
        room = logits_RV.new_empty((min(rows, len(logits_RV)), logits_RV.shape[1]), dtype=torch.float32)
    some = logits_RV.split(rows), targets_R[:, None].split(rows), weights_R[:, None].float().split(rows)
    for given, targets, weights in zip(*some, strict=True):
        logits = given if room is None else room[: len(given)].copy_(given)
        at_target = logits.gather(1, targets)
        maximum = logits.amax(1, keepdim=True)
        exponentials = logits.sub_(maximum).exp_()  # in place, since they are large
        normaliser = exponentials.sum(1, keepdim=True)
        entropies.append((normaliser.log() + maximum - at_target)[:, 0])
        if gradients:  # d(weight · cross-entropy) / d(logits) = weight · (softmax - one-hot)
            given.copy_(exponentials.mul_(weights / normaliser).scatter_add_(1, targets, -weights))
    return entropies


def _entropies_by_kernel(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor, gradients: bool) -> Tensor:
    from cogview_pl.kernels.transformer_triton import cross_entropies  # Triton is installed where a GPU is

    rows, ids = logits_RV.shape
    entropies_R = logits_RV.new_empty(rows, dtype=torch.float32)
    with current(logits_RV.device):
        cross_entropies[(rows,)](
            logits_RV, targets_R.contiguous(), weights_R.float().contiguous(), entropies_R, ids,
            GRADIENTS=gradients, BLOCK=_IDS_OF_KERNEL, num_warps=_WARPS_OF_KERNEL, **FUSED_SUMS,
        )  # fmt: skip
    return entropies_R


def _add_matmul(sum_VD: Tensor, gradients_RV: Tensor, hidden_RD: Tensor, ids: int) -> None:
    """Add gradientsᵀ · hidden. A result that needs a cast is computed for `ids` at a time, to save memory."""
    if hidden_RD.dtype == torch.float32:
        sum_VD.addmm_(gradients_RV.T, hidden_RD)
        return
    for some_sum, some_gradients in zip(sum_VD.split(ids), gradients_RV.split(ids, dim=1), strict=True):
        some_sum += some_gradients.T @ hidden_RD
