"""Sparse attention for training on long sequences (paper, appendix B): windows of near keys, and pivots far behind.

Shapes: B batch, H heads, L length, W queries of one window, S keys of one window, P pivots, K head size.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor


class SparseAttention:
    """An attention function in which a query sees near keys and a sample of the far ones.

    The sequence is cut into windows. A query sees every key up to itself in its own window and in the
    `num_windows - 1` before it, and of earlier keys the pivots. Pivots stand for the keys left out: log(L // P) is
    added to their scores, and one softmax runs over both. Time and memory are L · (P + W · num_windows), not L².

    Args:
        pivots_BP: int64 `(B, P)`, positions without repetition in each row, below L; see `draw_pivots`.
        window: W; it divides L.
        num_windows: windows seen in full, that of the query included.

    Raises:
        ValueError: `window` or `num_windows` is not positive.
    """

    def __init__(self, pivots_BP: Tensor, *, window: int, num_windows: int) -> None:
        if window < 1 or num_windows < 1:
            raise ValueError(f"window and num_windows must be positive, got {window} and {num_windows}")
        self.window = window
        self.num_windows = num_windows
        self._pivots_BP = pivots_BP.sort(-1).values  # what a window sees of them is then a prefix
        self._earliest_P: list[int] = self._pivots_BP.amin(0).tolist()

    def __call__(
        self, q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend over a whole sequence.

        Raises:
            ValueError: there is a mask (only whole sequences without a cache are supported), L is not a multiple of
                the window, or L is smaller than P.
        """
        if mask_BHLS is not None:
            raise ValueError("sparse attention trains on whole sequences; with a mask or a cache use a dense one")
        bonus = self._bonus(q_BHLK.shape[2])
        k_pivots_BHPK, v_pivots_BHPK = self._at_pivots(k_BHSK), self._at_pivots(v_BHSK)
        k_windows, v_windows = k_BHSK.split(self.window, 2), v_BHSK.split(self.window, 2)
        outputs = []
        for index, q_BHWK in enumerate(q_BHLK.split(self.window, 2)):
            first = max(0, index - self.num_windows + 1)
            near = slice(first, index + 1)
            far = slice(bisect_left(self._earliest_P, first * self.window))  # the most that any row sees
            outputs.append(
                F.scaled_dot_product_attention(
                    q_BHWK,
                    torch.cat([k_pivots_BHPK[:, :, far], *k_windows[near]], 2),
                    torch.cat([v_pivots_BHPK[:, :, far], *v_windows[near]], 2),
                    attn_mask=self._bias(near, far, bonus).to(q_BHLK.dtype),
                    dropout_p=dropout,
                )
            )
        return torch.cat(outputs, 2)

    def _bonus(self, length: int) -> float:
        """What is added to the score of a pivot."""
        num_pivots = self._pivots_BP.shape[1]
        if length % self.window:
            raise ValueError(f"sparse attention: length {length} is not a multiple of the window, {self.window}")
        if length < num_pivots:
            raise ValueError(f"sparse attention: length {length} is smaller than the number of pivots, {num_pivots}")
        return math.log(length // num_pivots)  # the integer division is the original's, kept for equal results

    def _at_pivots(self, x_BHSK: Tensor) -> Tensor:
        _, num_heads, _, head_size = x_BHSK.shape
        return x_BHSK.gather(2, self._pivots_BP[:, None, :, None].expand(-1, num_heads, -1, head_size))

    def _bias(self, near: slice, far: slice, bonus: float) -> Tensor:
        """Added to the scores of the last window in `near`, over pivots and near keys: `(B, 1, W, S)`, -inf hides."""
        pivots_BP = self._pivots_BP[:, far]
        far_BP = torch.where(pivots_BP < near.start * self.window, bonus, float("-inf"))
        before = (near.stop - 1 - near.start) * self.window  # near keys ahead of the queries' own window
        hidden_WS = torch.full((self.window, before + self.window), float("-inf"), device=pivots_BP.device)
        near_WS = hidden_WS.triu(before + 1)
        batch = pivots_BP.shape[0]
        far_BWP, near_BWS = far_BP[:, None].expand(-1, self.window, -1), near_WS.expand(batch, -1, -1)
        return torch.cat([far_BWP, near_BWS], -1)[:, None]


def draw_pivots(text_BL: Tensor, image_BL: Tensor, num_pivots: int, generator: torch.Generator | None = None) -> Tensor:
    """Pivots of every row: all its text positions, filled up with image positions drawn without replacement.

    The paper draws anew for every group of layers between two activation checkpoints; all heads share a draw.

    Args:
        text_BL: bool `(B, L)`, True at text positions: real tokens that are no image codes.
        image_BL: bool `(B, L)`, True at image codes.
        num_pivots: P.
        generator: source of randomness, on the device of the masks; None for the global one.

    Returns:
        int64 `(B, P)`, in no particular order.

    Raises:
        ValueError: a row has more text positions than P, or fewer text and image positions together.
    """
    num_text_B, num_all_B = text_BL.sum(-1), (text_BL | image_BL).sum(-1)
    if (num_text_B > num_pivots).any() or (num_all_B < num_pivots).any():
        raise ValueError(
            f"cannot draw {num_pivots} pivots: the rows have up to {int(num_text_B.max())} text positions, which all "
            f"become pivots, and down to {int(num_all_B.min())} text and image positions together"
        )
    ranks_BL = torch.rand(text_BL.shape, generator=generator, device=text_BL.device)
    ranks_BL = ranks_BL.masked_fill(~image_BL, -1.0).masked_fill(text_BL, 1.0)  # draws are below 1
    return ranks_BL.topk(num_pivots).indices
