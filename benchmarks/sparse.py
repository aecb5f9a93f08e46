"""Sparse against dense attention, forward and backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.contest import Work, contest
from benchmarks.report import Result, Row, result
from benchmarks.settings import DEVICE
from cogview_pl.transformer.attention import AttentionFunction, fused_attention
from cogview_pl.transformer.sparse import SparseAttention, draw_pivots

ROUNDS = 7
HEADS, HEAD_SIZE = 6, 64
NUM_PIVOTS = 768
TEXT_LENGTH = 64
# Length, window, windows: 768 near keys each, as in the paper; 1,088 is no multiple of the paper's window of 128.
SETTINGS = ((1088, 64, 12), (4096, 128, 6))


def rows() -> list[Row]:
    """One per length."""
    return [Row(f"sparse:{setting[0]}-tokens", partial(measure, *setting)) for setting in SETTINGS]


def measure(length: int, window: int, num_windows: int) -> Result:
    """Milliseconds of one pass forward and backward."""
    torch.manual_seed(0)
    new_input = partial(torch.randn, 1, HEADS, length, HEAD_SIZE, device=DEVICE, requires_grad=True)
    inputs = [new_input() for _ in range(3)]
    is_text = torch.arange(length, device=DEVICE)[None] < TEXT_LENGTH
    pivots = draw_pivots(is_text, ~is_text, NUM_PIVOTS)
    sparse = SparseAttention(pivots, window=window, num_windows=num_windows)
    contenders = {"sparse": _pass(sparse, inputs), "dense": _pass(fused_attention, inputs)}
    found = result("ms", contest(contenders, ROUNDS), {})
    found.facts["sparse / dense"] = found.values["sparse"] / found.values["dense"]
    return found


def _pass(attend: AttentionFunction, inputs: list[Tensor]) -> Work:
    q, k, v = inputs
    return lambda: torch.autograd.grad(attend(q, k, v, None, 0.0).sum(), inputs)
