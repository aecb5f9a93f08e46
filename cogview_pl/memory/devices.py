"""Makes a model without memory keep for the backward pass what a real one keeps on a CPU or on a GPU.

Tensors without memory that stand on a GPU need one, so plans are made on the CPU. A GPU differs in three ways: dropout
keeps one byte per number instead of a factor, fused attention keeps no mask of its dropout, and under autocast
LayerNorm and the maximum in front of it run in fp32, where a CPU stays in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cogview_pl.kernels.cpu_linear import ONEDNN_IS_FASTER, Linear, by_convolution
from cogview_pl.transformer.attention import fused_attention
from cogview_pl.transformer.block import Attention, LayerNorm
from cogview_pl.transformer.lora import LoRALinear
from cogview_pl.transformer.model import Transformer


def keep_as_on_a_cpu(model: Transformer) -> None:
    """Take fp32 products as convolutions where real ones are, in place: they keep inputs even of frozen weights."""
    if not ONEDNN_IS_FASTER:
        return
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = _Convolution
        elif type(module) is LoRALinear:
            module.__class__ = _LoRAConvolution


def keep_as_on_a_gpu(model: Transformer) -> None:
    """Replace dropout, LayerNorms and fused attention in place. The model is good for counting only."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, _Dropout(child.p))
            elif isinstance(child, LayerNorm):
                child.__class__ = _LayerNorm
            elif isinstance(child, Attention) and child.function is fused_attention:
                child.function = _without_mask


class _Convolution(Linear):
    def forward(self, input: Tensor) -> Tensor:
        fp32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return by_convolution(input, self.weight, self.bias) if fp32 else super().forward(input)


class _LoRAConvolution(LoRALinear, _Convolution):
    """The frozen map; those beside it are trained and keep the same either way."""


class _Dropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0] if self.training and self.p > 0 else input


class _LayerNorm(LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float() if torch.is_autocast_enabled("cpu") else input)


def _without_mask(q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BHLS: Tensor | None, dropout: float) -> Tensor:
    return fused_attention(q_BHLK, k_BHSK, v_BHSK, mask_BHLS, 0.0)
