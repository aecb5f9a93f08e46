"""From logits to a token: guidance, temperature, top-k, top-p, and a sample by the inverse of the cumulative sum.

Shapes: B rows, n candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_pl.generation.config import Sampling
from cogview_pl.kernels.availability import runs_kernels, widest_float

_WIDEST_FOR_KERNEL = 16_384  # candidates of a row that the kernel holds on the chip


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Logits of classifier-free guidance, float32 `(B, n)`, from logits `(B, n)` with and without the condition."""
    return unconditional.float() + guidance * (conditional.float() - unconditional.float())


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Filtered probabilities, float32 `(B, n)`, of logits `(B, n)`."""
    logits = logits.float()
    if sampling.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)  # `one_hot` may wait for the device to check ids
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # so that no temperature overflows
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > sampling.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.softmax(-1)


def sample_logits(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """`sample` from the `probabilities` of logits `(B, n)`, int64 `(B,)`; on a GPU one kernel does both.

    The kernel keeps the same candidates, ties included. Its sums have another order, so one sample in millions differs.
    """
    covered = sampling.temperature > 0 and sampling.top_p == 1 and logits.shape[-1] <= _WIDEST_FOR_KERNEL
    if covered and runs_kernels(logits.device):
        from cogview_pl.kernels.sampling_triton import sample_by_kernel  # Triton is installed where a GPU is

        return sample_by_kernel(logits, uniform, temperature=sampling.temperature, top_k=sampling.top_k)
    return sample(probabilities(logits, sampling), uniform)


def sample(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sampled column of each row, int64 `(B,)`.

    Args:
        probabilities: `(B, n)`; need not be normalised.
        uniform: one number in [0, 1) per row, `(B,)`: the only source of randomness.
    """
    precise = widest_float(probabilities.device)  # in fp64 the product below stays under the total
    cumulative = probabilities.to(precise).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    columns = torch.searchsorted(cumulative, uniform.to(precise)[:, None] * total, right=True)
    if precise != torch.float64:
        columns = columns.minimum(torch.searchsorted(cumulative, total))  # the last column that can be sampled
    return columns.squeeze(-1)
