"""From logits to one drawn token: guidance, temperature, top-k, top-p, a draw by the inverse of the cumulative sum.

Shapes: B rows, n candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cogview_pl.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely candidates (ties at the threshold stay); 0 keeps all.
        top_p: keep the most likely candidates until their probabilities pass p (the one that passes stays); 1 keeps
            all.
        algorithm: `sequential`, one code per pass of the model; `jacobi`, several from the same distribution (see
            `jacobi.py`; for the codes of a image from a text, other slots are filled sequentially).
        drafts: with `jacobi`, how many codes each pass looks at ahead.
        guidance: how far the text is followed: logits without the text, plus `guidance` times what the text adds to
            them. 1 samples from the model as it is, more follows the text more, less follows it less, 0 ignores it.
        cuda_graphs: on a GPU, sample codes one after the other by captured graphs (see `static_step.py`).

    Raises:
        UserError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    algorithm: Literal["sequential", "jacobi"] = "sequential"
    drafts: int = 16
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        filters_hold = self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1  # NaN fails too
        if not (filters_hold and 0 <= self.guidance < math.inf and self.drafts > 0):
            raise UserError(
                "sampler: temperature and top_k must not be negative, top_p lies in (0, 1], guidance is finite and not "
                f"negative, drafts is positive; got {self}"
            )

    @property
    def guided(self) -> bool:
        """Whether a second prompt, without the text, is needed to sample."""
        return self.guidance != 1

    def plain(self) -> Sampling:
        """The same for models that are not guided and yield one token per pass."""
        return replace(self, guidance=1.0, algorithm="sequential")


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


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Column drawn in each row, int64 `(B,)`.

    Args:
        probabilities: `(B, n)`; need not be normalised.
        uniform: one number in [0, 1) per row, `(B,)`: the only source of randomness.
    """
    cumulative = probabilities.double().cumsum(-1)  # fp64: the product below must stay under the total
    point = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1)
