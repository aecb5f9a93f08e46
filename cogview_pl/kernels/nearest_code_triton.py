"""Code search on a GPU in one Triton kernel.

A GPU is fast at matmuls in half precision, but a codebook rounded to it gives another code for one vector in a hundred.
The kernel therefore splits each code into two numbers of half precision whose sum has 16 bits, and fp32 vectors too.
For vectors in half precision the distances are as good as in fp32; for fp32 vectors only codes whose distances agree
to five digits are confused. Distances stay on the chip; only the nearest code is written to memory.

Shapes: N vectors, D codebook_dim, K codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cogview_pl.kernels.availability import FUSED_SUMS, current

# Tile of a program, chosen on an H100 for D = 256. Split vectors take twice the space.
_VECTORS, _SPLIT_VECTORS, _CODES, _WARPS, _STAGES = 128, 64, 64, 8, 2


@triton.jit
def _nearest(
    x_ND, x_low_ND, high_KD, low_KD, norm_K, codes_N, distance_N, num_vectors, codebook_size, codebook_dim,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_n = n < num_vectors
    in_d = d < codebook_dim
    own = n[:, None].to(tl.int64) * codebook_dim + d[None, :]
    held = in_n[:, None] & in_d[None, :]
    x = tl.load(x_ND + own, held, 0.0)
    wide = x.to(tl.float32)
    if SPLIT:
        x_low = tl.load(x_low_ND + own, held, 0.0)
        wide += x_low.to(tl.float32)
    own_norm = tl.sum(wide * wide, 1)  # before the loop, during which the wide numbers would hold half of the registers
    least = tl.full((BLOCK_N,), float("inf"), tl.float32)
    nearest = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, codebook_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < codebook_size
        places = k[None, :] * codebook_dim + d[:, None]
        held_code = in_k[None, :] & in_d[:, None]
        high = tl.load(high_KD + places, held_code, 0.0)
        products = tl.dot(x, tl.load(low_KD + places, held_code, 0.0))
        if SPLIT:
            products = tl.dot(x_low, high, products)
        products = tl.dot(x, high, products)
        scores = tl.load(norm_K + k, in_k, float("inf"))[None, :] - 2.0 * products
        score, at = tl.min(scores, 1, return_indices=True)
        nearest = tl.where(score < least, start + at, nearest)
        least = tl.minimum(score, least)
    tl.store(codes_N + n, nearest.to(tl.int64), in_n)
    tl.store(distance_N + n, least + own_norm, in_n)


def nearest_by_kernel(x_ND: Tensor, codebook_DK: Tensor) -> tuple[Tensor, Tensor]:
    """`codebook.nearest` on a GPU; of equally near codes the lowest index wins."""
    half = x_ND.dtype if x_ND.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    split = x_ND.dtype != half
    codebook_KD = codebook_DK.float().T.contiguous()
    (x_high_ND, x_low_ND), (high_KD, low_KD) = _halves(x_ND.contiguous(), half), _halves(codebook_KD, half)
    num_vectors, codebook_dim = x_ND.shape
    codes_N = torch.empty(num_vectors, dtype=torch.int64, device=x_ND.device)
    distance_N = torch.empty(num_vectors, dtype=torch.float32, device=x_ND.device)
    at_once = _SPLIT_VECTORS if split else _VECTORS
    with current(x_ND.device):
        _nearest[(triton.cdiv(num_vectors, at_once),)](
            x_high_ND, x_low_ND, high_KD, low_KD, codebook_KD.square().sum(1), codes_N, distance_N,
            num_vectors, len(codebook_KD), codebook_dim, SPLIT=split,
            BLOCK_D=max(16, triton.next_power_of_2(codebook_dim)), BLOCK_N=at_once,
            BLOCK_K=_CODES, num_warps=_WARPS, num_stages=_STAGES, **FUSED_SUMS,
        )  # fmt: skip
    return codes_N, distance_N.clamp_(min=0)


def _halves(values: Tensor, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors of half precision whose sum is nearly the values."""
    high = values.to(half)
    return high, (values - high.to(values.dtype)).to(half)
