"""Attention in three forms: fused, the explicit PB-Relax formula of the paper, and the naive formula.

Shapes: B batch, H heads, L queries, S keys, K head size.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.transformer.config import AttentionForm

PB_RELAX_ALPHA = 32.0
"""α of paper §2.4: scores are computed at 1/α of their size and multiplied by α after the maximum is subtracted."""


class AttentionFunction(Protocol):
    """Attention of queries over keys; `mask_BHLS` is True where a query may see a key.

    Without a mask, attention is causal if L = S, and a single query sees all keys.
    """

    def __call__(
        self, q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float
    ) -> Tensor: ...


def fused_attention(q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float) -> Tensor:
    """`scaled_dot_product_attention`; its kernels compute scores in fp32, so fp16 inputs do not overflow them."""
    is_causal = False
    if mask_BHLS is None and q_BHLK.shape[2] > 1:  # a branch, since torch.compile may make the comparison symbolic
        is_causal = True
    return F.scaled_dot_product_attention(
        q_BHLK, k_BHSK, v_BHSK, attn_mask=mask_BHLS, dropout_p=dropout, is_causal=is_causal
    )


def pb_relax_attention(
    q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float
) -> Tensor:
    """softmax(α·(QKᵀ/(α√K) − max QKᵀ/(α√K))) V, paper §2.4, in the precision of its inputs."""
    scaled_q_BHLK = q_BHLK / (PB_RELAX_ALPHA * math.sqrt(q_BHLK.shape[-1]))
    scores_BHLS = _hide(scaled_q_BHLK @ k_BHSK.transpose(-2, -1), mask_BHLS)
    relaxed_BHLS = (scores_BHLS - scores_BHLS.amax(-1, keepdim=True).detach()) * PB_RELAX_ALPHA
    return F.dropout(relaxed_BHLS.softmax(-1), dropout) @ v_BHSK


def naive_attention(q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float) -> Tensor:
    """softmax(QKᵀ/√K) V with the matmul before the division, which overflows in fp16. For stability studies."""
    scores_BHLS = (q_BHLK @ k_BHSK.transpose(-2, -1)) / math.sqrt(q_BHLK.shape[-1])
    return F.dropout(_hide(scores_BHLS, mask_BHLS).softmax(-1), dropout) @ v_BHSK


ATTENTIONS: dict[AttentionForm, AttentionFunction] = {
    AttentionForm.fused: fused_attention,
    AttentionForm.pb_relax: pb_relax_attention,
    AttentionForm.naive: naive_attention,
}


def _hide(scores_BHLS: Tensor, mask_BHLS: Tensor | None) -> Tensor:
    queries, keys = scores_BHLS.shape[-2:]
    if mask_BHLS is None and queries == 1:
        return scores_BHLS
    if mask_BHLS is None:
        mask_BHLS = torch.ones(queries, keys, dtype=torch.bool, device=scores_BHLS.device).tril()
    return scores_BHLS.masked_fill(~mask_BHLS, float("-inf"))
