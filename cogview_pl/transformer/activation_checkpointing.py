"""How a block runs in training: compiled, and with what of it the backward pass computes anew.

Shapes: B batch, L length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogview_pl.transformer.attention import AttentionFunction

RECOMPUTE = ("none", "selective", "block")
"""What the backward pass computes anew: nothing; all but matrix products and fused attention; a whole block."""

# Private names of the attention kernels, checked against torch 2.15. Without one of them the backward pass computes
# that kernel again.
_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,  # linear maps in fp32 on a CPU (`cogview_pl.kernels.cpu_linear`)
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Dear to compute for their size. Not `bmm`: in the written-out forms of attention its results are L × L."""


class Trainable(Protocol):
    """A block as training runs it."""

    def whole(self, x_BLD: Tensor, attend: AttentionFunction | None) -> Tensor:
        """Residual stream in, residual stream out, without a cache."""
        ...


def training_pass(
    block: Trainable, x_BLD: Tensor, attend: AttentionFunction | None, *, recompute: str, compiled: bool
) -> Tensor:
    """`block.whole`, with less kept for the backward pass, or compiled, or both; the same numbers."""
    return (_compiled_pass() if compiled else _pass)(block, x_BLD, attend, recompute)


def _pass(block: Trainable, x_BLD: Tensor, attend: AttentionFunction | None, recompute: str) -> Tensor:
    if recompute == "none":
        return block.whole(x_BLD, attend)
    # torch.compile wants to see the contexts made right where they are used. Random numbers (dropout) are drawn again
    # from the state that they were drawn from.
    if recompute == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(block.whole, x_BLD, attend, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]
    return checkpoint(block.whole, x_BLD, attend, use_reentrant=False)  # type: ignore[no-any-return]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _compiled_pass() -> Callable[..., Tensor]:
    """One compiled function for all blocks: they differ in their weights alone, which are inputs of it."""
    return torch.compile(_pass)
