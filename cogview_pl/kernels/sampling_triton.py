"""A sample from logits on a GPU in one Triton kernel: temperature, top-k without a sort, softmax, inverse of the sum.

Shapes: B rows, n candidates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_pl.kernels.availability import FUSED_SUMS, current

_WARPS = 16  # of the program for one row, which holds all of it in registers


@triton.jit
def _kth_largest(x_n, inside, k):
    """The k-th largest number of a row, by bisection on its bits."""
    bits = x_n.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True)  # in the order of the numbers
    ordered = tl.where(inside, ordered, 0)
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((ordered >= (found | bit)).to(tl.int32)) >= k
        found = tl.where(enough, found | bit, found)
        bit = bit >> 1
    bits = tl.where(found >> 31 == 0, found ^ 0xFFFFFFFF, found ^ 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sample(logits_Bn, uniform_B, columns_B, candidates, temperature, k, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row; see `sample_by_kernel`."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < candidates
    x = tl.load(logits_Bn + row.to(tl.int64) * candidates + column, inside, float("-inf")).to(tl.float32)
    x = (x - tl.max(x)) * tl.div_rn(1.0, temperature)  # torch multiplies by the inverse on a GPU too
    shares = tl.where(inside, tl.exp(x), 0.0)
    if TOP_K:
        shares = tl.where(x < _kth_largest(x, inside, k), 0.0, shares)
    cumulative = tl.cumsum(shares.to(tl.float64))
    until = tl.load(uniform_B + row).to(tl.float64) * tl.max(cumulative)
    tl.store(columns_B + row, tl.sum((inside & (cumulative <= until)).to(tl.int64)))


def sample_by_kernel(logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """Sampled column of each row, int64 `(B,)`.

    The candidates that top-k keeps are those of `sampling.probabilities`, ties included. The sums have another order
    and exponentials another last digit, so one sample in millions differs.

    Args:
        logits: `(B, n)`.
        uniform: one number in [0, 1) per row, `(B,)`.
        temperature: above 0.
        top_k: 0 keeps all.
    """
    rows, candidates = logits.shape
    columns_B = torch.empty(rows, dtype=torch.int64, device=logits.device)
    with current(logits.device):
        _sample[(rows,)](
            logits.contiguous(), uniform.contiguous(), columns_B, candidates, temperature, top_k,
            TOP_K=0 < top_k < candidates, BLOCK=triton.next_power_of_2(candidates), num_warps=_WARPS,
            **FUSED_SUMS,
        )  # fmt: skip
    return columns_B
