"""Activation checkpointing of a block, and its compilation.

Shapes: B batch, L length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogview_pl.transformer.config import ActivationCheckpointing

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
"""Operators whose results `selective` keeps. Not `bmm`: in the explicit forms of attention its results are L × L."""


class Trainable(Protocol):
    """A block in training."""

    def run(self, x_BLD: Tensor) -> Tensor:
        """Residual stream in, residual stream out, without a cache."""
        ...


def training_forward(
    block: Trainable, x_BLD: Tensor, checkpointing: ActivationCheckpointing, *, compiled: bool
) -> Tensor:
    """`block.run` with activation checkpointing, by torch.compile if `compiled`; the numbers stay the same."""
    return (_compiled_forward() if compiled else _forward)(block, x_BLD, checkpointing)


def _forward(block: Trainable, x_BLD: Tensor, checkpointing: ActivationCheckpointing) -> Tensor:
    if checkpointing == ActivationCheckpointing.none:
        return block.run(x_BLD)
    # torch.compile must see the contexts made where they are used. The recomputation restores the state of the random
    # generator, so dropout is the same.
    if checkpointing == ActivationCheckpointing.selective:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(block.run, x_BLD, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]
    return checkpoint(block.run, x_BLD, use_reentrant=False)  # type: ignore[no-any-return]


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _compiled_forward() -> Callable[..., Tensor]:
    """One compiled function for all blocks: only their weights differ, and these are inputs of the function."""
    return torch.compile(_forward)
