"""Speed of sparse against dense attention, forward and backward: medians, taken in turns in one process.

`nox -s bench -- sparse`.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
from torch import Tensor

from cogview_pl.transformer.attention import AttentionFunction, fused_attention
from cogview_pl.transformer.sparse import SparseAttention, draw_pivots

ROUNDS = 7
HEADS, HEAD_SIZE = 6, 64
NUM_PIVOTS = 768
TEXT_LENGTH = 64
# Length, window, windows: 768 near keys each, as in the paper; 1,088 is no multiple of the paper's window of 128.
SETTINGS = ((1088, 64, 12), (4096, 128, 6))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(attend: AttentionFunction, inputs: list[Tensor]) -> float:
    """Wall time of one pass forward and backward."""
    q, k, v = inputs
    started = time.perf_counter()
    torch.autograd.grad(attend(q, k, v, None, 0.0).sum(), inputs)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(length: int, window: int, num_windows: int) -> None:
    """Print the medians at one length, and their ratio."""
    new_input = partial(torch.randn, 1, HEADS, length, HEAD_SIZE, device=DEVICE, requires_grad=True)
    inputs = [new_input() for _ in range(3)]
    is_text = torch.arange(length, device=DEVICE)[None] < TEXT_LENGTH
    pivots = draw_pivots(is_text, ~is_text, NUM_PIVOTS)
    functions = (fused_attention, SparseAttention(pivots, window=window, num_windows=num_windows))
    rounds = [[seconds(attend, inputs) for attend in functions] for _ in range(1 + ROUNDS)][1:]  # the first warms up
    dense, sparse = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(
        f"{length} tokens, {num_windows} windows of {window}, {NUM_PIVOTS} pivots: dense {dense * 1e3:.0f} ms, "
        f"sparse {sparse * 1e3:.0f} ms, sparse / dense {sparse / dense:.2f}"
    )


def main() -> None:
    """Both lengths."""
    torch.manual_seed(0)
    for setting in SETTINGS:
        compare(*setting)
