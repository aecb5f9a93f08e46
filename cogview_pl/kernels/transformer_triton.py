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

FEW_ROWS = 4
"""Largest number of rows for `linear_of_few_rows`."""
LINE = 128
"""Bytes of a line of the L2 cache."""
_LINE = tl.constexpr(LINE)


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
def _add_products(sums_NJ, weight_NJI, x_D, places_JI, held_JI):
    """Sums plus products of one row; the axis I lies in one thread, so only the last sum crosses threads."""
    x_JI = tl.load(x_D + places_JI, held_JI, 0.0).to(tl.float32)
    return sums_NJ + tl.sum(weight_NJI * x_JI[None], 2)


@triton.jit
def _store_sums(y_N, n, in_n, sums_NJ, scale, bias, GELU: tl.constexpr):
    tl.store(y_N + n, _finish(tl.sum(sums_NJ, 1) * scale + bias, GELU).to(y_N.dtype.element_ty), in_n)


@triton.jit
def _fetch_to_l2(first, count, LINES: tl.constexpr, PER_LINE: tl.constexpr):
    """Ask for `count` numbers in a row from memory, without waiting and without registers for them."""
    line = tl.minimum(tl.arange(0, LINES) * PER_LINE, count - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [first + line], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def linear_of_few_rows(
    x_BD, weight_ND, scale_N, bias_N, y_BN, outputs, inputs,
    ROWS: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr, LINES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y = scale · (x · weightᵀ) + bias of at most `FEW_ROWS` rows; a program computes some outputs of all rows.

    A tile has `BLOCK_J` · `BLOCK_I` inputs. While the kernel before is still running, a program requests its first tile
    and has all its weights (`LINES` lines of the L2 cache) fetched into that cache.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_J)[:, None] * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    in_n = n < outputs
    in_N11 = in_n[:, None, None]
    weight_rows = weight_ND + n[:, None, None].to(tl.int64) * inputs
    tile = tl.load(weight_rows + d[None], in_N11 & (d < inputs)[None], 0.0)
    if OVERLAP:
        first = tl.program_id(0).to(tl.int64) * BLOCK_N * inputs
        own = tl.minimum(outputs - tl.program_id(0) * BLOCK_N, BLOCK_N) * inputs
        _fetch_to_l2(weight_ND + first, own, LINES, _LINE // (weight_ND.dtype.element_ty.primitive_bitwidth // 8))
        gdc_wait()
        gdc_launch_dependents()
    sums_1 = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    sums_2, sums_3, sums_4 = sums_1, sums_1, sums_1  # one tensor with an axis of rows would be distributed much worse
    for start in range(0, inputs, BLOCK_J * BLOCK_I):
        places = start + d
        held = places < inputs
        weight = tile.to(tl.float32)
        following = places + BLOCK_J * BLOCK_I
        tile = tl.load(weight_rows + following[None], in_N11 & (following < inputs)[None], 0.0)
        sums_1 = _add_products(sums_1, weight, x_BD, places, held)
        if ROWS > 1:
            sums_2 = _add_products(sums_2, weight, x_BD + inputs, places, held)
        if ROWS > 2:
            sums_3 = _add_products(sums_3, weight, x_BD + 2 * inputs, places, held)
        if ROWS > 3:
            sums_4 = _add_products(sums_4, weight, x_BD + 3 * inputs, places, held)
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if SCALE:
        scale = tl.load(scale_N + n, in_n, 0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        bias = tl.load(bias_N + n, in_n, 0.0).to(tl.float32)
    _store_sums(y_BN, n, in_n, sums_1, scale, bias, GELU)
    if ROWS > 1:
        _store_sums(y_BN + outputs, n, in_n, sums_2, scale, bias, GELU)
    if ROWS > 2:
        _store_sums(y_BN + 2 * outputs, n, in_n, sums_3, scale, bias, GELU)
    if ROWS > 3:
        _store_sums(y_BN + 3 * outputs, n, in_n, sums_4, scale, bias, GELU)


@triton.jit
def attend(
    qkv_B3HK, keys_BHCK, values_BHCK, lengths_B, y_BHK, parts, arrived,
    heads, row_stride, head_stride, scale,
    HEAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Append the new key and value to each row of the cache, and attend over the whole row.

    A program takes every `PARTS`-th block of `BLOCK_S` positions of one head of one row, and writes its partial result
    to `parts`, `(B·H, PARTS, BLOCK_K + 2)` fp32. The last program of a head (`arrived` counts them) sums the parts in
    their order, so the result does not depend on which program is last.
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
    largest = float("-inf")
    total = 0.0
    summed = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(part * BLOCK_S, length + 1, PARTS * BLOCK_S):  # the new position itself is one of them
        s = first + tl.arange(0, BLOCK_S)
        seen = (s < length)[:, None] & in_k[None, :]
        places = start + s[:, None] * HEAD + k[None, :]
        keys = tl.load(keys_BHCK + places, seen, 0.0)
        values = tl.load(values_BHCK + places, seen, 0.0)
        scores = tl.where(s < length, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
        is_here = length < first + BLOCK_S
        in_new = k < tl.where(is_here, HEAD, 0)  # Triton 3.9 interprets `in_k & is_here` as no mask
        new_key = tl.load(new + hidden_size, in_new, 0.0)
        new_value = tl.load(new + 2 * hidden_size, in_new, 0.0)
        if is_here:
            kind = keys_BHCK.dtype.element_ty
            tl.store(keys_BHCK + start + length * HEAD + k, new_key.to(kind), in_k)
            tl.store(values_BHCK + start + length * HEAD + k, new_value.to(kind), in_k)
        new_score = tl.where(is_here, tl.sum(new_key.to(tl.float32) * query), float("-inf"))
        before = largest
        largest = tl.maximum(tl.maximum(tl.max(scores), new_score), before)
        shrink = tl.exp(before - largest)
        shares = tl.exp(scores - largest)
        new_share = tl.exp(new_score - largest)
        total = total * shrink + tl.sum(shares) + new_share
        summed = summed * shrink + tl.sum(values.to(tl.float32) * shares[:, None], 0)
        summed += new_value.to(tl.float32) * new_share
    tl.store(mine + k, summed)
    tl.store(mine + BLOCK_K, largest)
    tl.store(mine + BLOCK_K + 1, total)
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
