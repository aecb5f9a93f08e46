"""Triton kernels for a GPU: a decoding step in seven kernels per block, and the loss.

A step of one row reads every weight once and computes little, so memory bounds its speed if kernels are few and do not
wait for each other. Linear maps therefore include bias and GELU; the end of one residual branch and the norm of the
next are one kernel; so are the write to the KV cache and attention. With `OVERLAP` a kernel starts before the previous
one has ended and waits for its results after it has begun to load its own weights (programmatic dependent launch, from
compute capability 9 on).

All sums are fp32. Shapes: B rows, D hidden size, H heads, K head size, C positions of the cache, N outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FEW_ROWS = 2
"""Largest number of rows for `linear_of_few_rows`; from 3 on it is slower than cuBLAS."""


@triton.jit
def _larger_and_sum(largest, total, other_largest, other_total):
    return tl.maximum(largest, other_largest), total + other_total


@triton.jit
def _layer_norm(
    x, inside, weight, bias, hidden_size, eps, RELAX: tl.constexpr, TARGET: tl.constexpr, SMALLEST: tl.constexpr
):
    """LayerNorm(x / (max|x| / TARGET)) of one row in fp32; x is 0 outside.

    Only eps makes LayerNorm depend on the scale of x, so eps is scaled instead of x; in fp32 that suffices.
    """
    largest, total = tl.reduce((tl.abs(x), x), 0, _larger_and_sum)
    if RELAX:
        divisor = tl.maximum(largest / TARGET, SMALLEST)
        eps = eps * divisor * divisor
    centred = tl.where(inside, x - total / hidden_size, 0.0)
    variance = tl.sum(centred * centred) / hidden_size
    return centred * (1.0 / tl.sqrt(variance + eps)) * weight + bias


@triton.jit
def close_and_open(
    x_BD, branch_BD, y_BD, branch_weight, branch_bias, weight, bias, hidden_size, eps,
    BRANCH_NORM: tl.constexpr, RELAX: tl.constexpr, TARGET: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x += LN(branch), in place; y = LN(x). One program per row."""
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden_size
    own_weight = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    own_bias = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    if BRANCH_NORM:
        its_weight = tl.load(branch_weight + columns, inside, 0.0).to(tl.float32)
        its_bias = tl.load(branch_bias + columns, inside, 0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    places = tl.program_id(0).to(tl.int64) * hidden_size + columns  # a batch may have more than 2³¹ numbers
    branch = tl.load(branch_BD + places, inside, 0.0).to(tl.float32)
    x = tl.load(x_BD + places, inside, 0.0).to(tl.float32)
    if BRANCH_NORM:
        branch = _layer_norm(branch, inside, its_weight, its_bias, hidden_size, eps, RELAX, TARGET, SMALLEST)
    kind = x_BD.dtype.element_ty
    x = tl.where(inside, x + branch, 0.0).to(kind)
    tl.store(x_BD + places, x, inside)
    y = _layer_norm(x.to(tl.float32), inside, own_weight, own_bias, hidden_size, eps, RELAX, TARGET, SMALLEST)
    tl.store(y_BD + places, y.to(kind), inside)


@triton.jit
def _finish(sums, GELU: tl.constexpr):
    """GELU in its tanh form: x/2 · (1 + tanh u) = x · sigmoid(2u)."""
    if GELU:
        sums = sums / (1.0 + tl.exp(-1.5957691216057308 * (sums + 0.044715 * sums * sums * sums)))
    return sums


@triton.jit
def _add_products(sums, weight, x_D, places, held):
    return sums + weight * tl.load(x_D + places, held, 0.0).to(tl.float32)[None, :]


@triton.jit
def _store_sums(y_N, n, in_n, sums, scale, bias, GELU: tl.constexpr):
    tl.store(y_N + n, _finish(tl.sum(sums, 1) * scale + bias, GELU).to(y_N.dtype.element_ty), in_n)


@triton.jit
def linear_of_few_rows(
    x_BD, weight_ND, scale_N, bias_N, y_BN, outputs, inputs,
    ROWS: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = scale · (x · weightᵀ) + bias of one or two rows; a program computes some outputs of all rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_n = n < outputs
    weight_rows = weight_ND + n[:, None].to(tl.int64) * inputs
    tile = tl.load(weight_rows + d[None, :], in_n[:, None] & (d < inputs)[None, :], 0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    first = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    second = first  # a tensor with an axis of rows would be distributed over threads much worse
    for start in range(0, inputs, BLOCK_D):
        places = start + d
        held = places < inputs
        weight = tile.to(tl.float32)
        first = _add_products(first, weight, x_BD, places, held)
        if ROWS > 1:
            second = _add_products(second, weight, x_BD + inputs, places, held)
        following = places + BLOCK_D
        tile = tl.load(weight_rows + following[None, :], in_n[:, None] & (following < inputs)[None, :], 0.0)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if SCALE:
        scale = tl.load(scale_N + n, in_n, 0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        bias = tl.load(bias_N + n, in_n, 0.0).to(tl.float32)
    _store_sums(y_BN, n, in_n, first, scale, bias, GELU)
    if ROWS > 1:
        _store_sums(y_BN + outputs, n, in_n, second, scale, bias, GELU)


@triton.jit
def attend(
    qkv_B3HK, keys_BHCK, values_BHCK, lengths_B, y_BHK, parts, arrived,
    heads, row_stride, head_stride, scale,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Append the new key and value to each row of the cache, and attend over the whole row.

    A program takes `BLOCK_S` positions of one head of one row and writes its partial result to `parts`,
    `(B·H, PARTS, BLOCK_K + 2)` fp32. The last program of a head (`arrived` counts them) sums the parts in their order,
    so the result does not depend on which program is last.
    """
    own = tl.program_id(0)
    part = tl.program_id(1)
    row = own // heads
    head = own % heads
    k = tl.arange(0, BLOCK_K)
    in_k = k < HEAD
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths_B + row)
    hidden_size = heads * HEAD
    new = qkv_B3HK + row * 3 * hidden_size + head * HEAD + k
    query = tl.load(new, in_k, 0.0).to(tl.float32) * scale
    start = row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    mine = parts + (own * PARTS + part) * (BLOCK_K + 2)
    s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    if part * BLOCK_S <= length:  # the new position itself is one of them
        seen = (s < length)[:, None] & in_k[None, :]
        places = start + s[:, None] * HEAD + k[None, :]
        keys = tl.load(keys_BHCK + places, seen, 0.0).to(tl.float32)
        values = tl.load(values_BHCK + places, seen, 0.0).to(tl.float32)
        scores = tl.where(s < length, tl.sum(keys * query[None, :], 1), float("-inf"))
        is_here = length < (part + 1) * BLOCK_S
        new_key = tl.load(new + hidden_size, in_k, 0.0)
        new_value = tl.load(new + 2 * hidden_size, in_k, 0.0)
        if is_here:
            kind = keys_BHCK.dtype.element_ty
            tl.store(keys_BHCK + start + length * HEAD + k, new_key.to(kind), in_k)
            tl.store(values_BHCK + start + length * HEAD + k, new_value.to(kind), in_k)
        new_score = tl.where(is_here, tl.sum(new_key.to(tl.float32) * query), float("-inf"))
        largest = tl.maximum(tl.max(scores), new_score)
        shares = tl.exp(scores - largest)
        new_share = tl.exp(new_score - largest)
        total = tl.sum(shares) + new_share
        summed = tl.sum(values * shares[:, None], 0) + new_value.to(tl.float32) * new_share
        tl.store(mine + k, summed)
        tl.store(mine + BLOCK_K, largest)
        tl.store(mine + BLOCK_K + 1, total)
    else:
        tl.store(mine + BLOCK_K, float("-inf"))
        tl.store(mine + BLOCK_K + 1, 0.0)
    tl.debug_barrier()
    if tl.atomic_add(arrived + own, 1, sem="acq_rel") == PARTS - 1:
        p = tl.arange(0, PARTS_2)
        in_p = p < PARTS
        theirs = parts + (own * PARTS + p) * (BLOCK_K + 2)
        largests = tl.load(theirs + BLOCK_K, in_p, float("-inf"), cache_modifier=".cg")
        shares = tl.exp(largests - tl.max(largests))
        total = tl.sum(tl.load(theirs + BLOCK_K + 1, in_p, 0.0, cache_modifier=".cg") * shares)
        held = (in_p & (largests > float("-inf")))[:, None] & in_k[None, :]
        summed = tl.sum(tl.load(theirs[:, None] + k[None, :], held, 0.0, cache_modifier=".cg") * shares[:, None], 0)
        tl.store(y_BHK + row * hidden_size + head * HEAD + k, (summed / total).to(y_BHK.dtype.element_ty), in_k)
        tl.store(arrived + own, 0)  # for the next step


@triton.jit
def cross_entropies(
    logits_RV, targets_R, weights_R, entropies_R, vocabulary, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Cross-entropies in fp32; with `GRADIENTS`, weight · (softmax - one-hot) overwrites the logits.

    One program per row reads it twice and writes it once.
    """
    row = tl.program_id(0)
    logits_V = logits_RV + row.to(tl.int64) * vocabulary
    target = tl.load(targets_R + row)
    weight = tl.load(weights_R + row)
    v = tl.arange(0, BLOCK)
    largest_of_lane = tl.full((BLOCK,), -1e38, tl.float32)  # finite, so that an empty lane has a finite difference
    total_of_lane = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        logits = tl.load(logits_V + start + v, start + v < vocabulary, float("-inf")).to(tl.float32)
        larger = tl.maximum(largest_of_lane, logits)
        total_of_lane = total_of_lane * tl.exp(largest_of_lane - larger) + tl.exp(logits - larger)
        largest_of_lane = larger
    largest = tl.max(largest_of_lane)
    total = tl.sum(total_of_lane * tl.exp(largest_of_lane - largest))
    at_target = tl.load(logits_V + target).to(tl.float32)
    tl.store(entropies_R + row, tl.log(total) + largest - at_target)
    if GRADIENTS:
        tl.debug_barrier()  # all threads have read the logit of the target
        for start in range(0, vocabulary, BLOCK):
            inside = start + v < vocabulary
            logits = tl.load(logits_V + start + v, inside, float("-inf")).to(tl.float32)
            gradients = weight * (tl.exp(logits - largest) / total - tl.where(start + v == target, 1.0, 0.0))
            tl.store(logits_V + start + v, gradients.to(logits_RV.dtype.element_ty), inside)
