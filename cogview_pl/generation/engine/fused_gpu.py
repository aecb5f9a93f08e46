"""GPU form of the model for inference: Triton kernels that fuse several operations.

With few rows (decoding) the kernels reach the speed of reading the weights; with many rows (prompts, ranking) they make
fewer passes over the residual stream than single operations. Results differ by rounding: sums are fp32, and fewer
intermediate results are rounded.

Shapes: B batch, L length, R rows (B · L), D hidden size, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels.availability import FUSED_SUMS, current, on_nvidia, runs_kernels
from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.kernels.torchao import int8_parts
from cogview_pl.transformer.attention import fused_attention
from cogview_pl.transformer.block import NORM_TARGET, SMALLEST_MAXIMUM, Attention, Block, Cache, LayerNorm, Residual
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.kv_cache import StaticKVCache
from cogview_pl.transformer.model import Transformer

_OVERLAP_FROM = (9, 0)  # compute capability that has programmatic dependent launch
# Sizes of a program. Warps, outputs, inputs of a tile and positions were measured on an H100 at the hidden sizes of the
# released models.
_WARPS, _OUTPUTS = 4, 2
_THREADS, _INPUTS_OF_THREAD = 128, 8  # a tile has their product of inputs
_WARPS_OF_ATTENTION, _POSITIONS = 2, 64
_PROGRAMS_OF_ATTENTION = 2640  # two rounds on 132 multiprocessors, each of which has registers for ten


def can_fuse(model: Transformer) -> bool:
    """Whether the kernels cover the model: plain or int8 weights, fused attention, LayerNorm before each branch."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    plain = all(
        type(part) is Linear and (type(part.weight.data) is Tensor or int8_parts(part.weight) is not None)
        for block in blocks
        for part in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down)
    )
    opened = all(isinstance(block.attention_residual.norm_in, LayerNorm) for block in blocks)
    fused = all(block.attention.function is fused_attention for block in blocks)
    return plain and opened and fused and not model.sharded and model.norm_scope != NormScope.tensor


def fused_model(model: Transformer) -> FusedModel | None:
    """GPU form of the model; None where the kernels do not run or do not cover the model."""
    possible = runs_kernels(model.token_embedding.weight.device) and not torch.is_autocast_enabled("cuda")
    return FusedModel(model) if possible and can_fuse(model) else None


class FusedModel:
    """Hidden states and logits of a model, without gradients.

    Args:
        model: the sequence model, in evaluation mode; see `can_fuse`.
    """

    def __init__(self, model: Transformer) -> None:
        from cogview_pl.kernels import transformer_triton as kernels

        self._kernels: Any = kernels
        self._power_of_2 = kernels.triton.next_power_of_2
        self._model = model
        self._blocks = [block for block in model.blocks if isinstance(block, Block)]
        residuals = [residual for block in self._blocks for residual in (block.attention_residual, block.mlp_residual)]
        openings = [residual.norm_in for residual in residuals if isinstance(residual.norm_in, LayerNorm)]
        self._norms = [*openings, model.final_norm]
        """LayerNorms before each branch and the final one, in order."""
        device = model.token_embedding.weight.device
        overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _OVERLAP_FROM
        self._launch = {"OVERLAP": overlap} | FUSED_SUMS | ({"launch_pdl": True} if overlap else {})
        relax = model.norm_scope == NormScope.token
        self._norm = {"RELAX": relax, "TARGET": NORM_TARGET, "SMALLEST": SMALLEST_MAXIMUM}

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Final normalised hidden states `(B, L, D)`; see `Transformer.hidden`."""
        following = iter(self._norms)
        mask = None if cache is None or isinstance(cache, StaticKVCache) else cache.mask(tokens.shape[1])
        x_RD = F.embedding(tokens.flatten(), self._model.token_embedding.weight)
        places_RD = F.embedding(positions.flatten(), self._model.position_embedding.weight)
        with current(x_RD.device):
            y_RD = self._close_and_open(x_RD, places_RD, None, next(following))
            for layer, block in enumerate(self._blocks):
                y_RD = self._attention(y_RD, tokens.shape, block.attention, mask, cache, layer)
                y_RD = self._close_and_open(x_RD, y_RD, block.attention_residual, next(following))
                y_RD = self._linear(self._linear(y_RD, block.mlp.up, gelu=True), block.mlp.down)
                y_RD = self._close_and_open(x_RD, y_RD, block.mlp_residual, next(following))
        return y_RD.view(*tokens.shape, -1)

    def logits(self, hidden: Tensor, ids: Sequence[range]) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)`; see `Transformer.logits`."""
        head_VD = self._model.token_embedding.weight
        hidden_RD = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        with current(hidden_RD.device):
            parts = [self._matmul(hidden_RD, head_VD[span.start : span.stop], None) for span in ids]
        return torch.cat(parts, -1).view(*hidden.shape[:-1], -1)

    def _attention(
        self, x_RD: Tensor, shape: torch.Size, part: Attention, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        """Attention with its linear maps."""
        qkv_R3D = self._linear(x_RD, part.qkv)
        if isinstance(cache, StaticKVCache):
            return self._linear(self._attend_one(qkv_R3D, cache, layer, part.head_size), part.out)
        projected = qkv_R3D.view(*shape, 3, part.num_heads, part.head_size).permute(2, 0, 3, 1, 4)
        q_BHLK, keys, values = projected.unbind()
        if cache is not None:
            keys, values = cache.store(layer, projected[1:])
        y_BHLK = fused_attention(q_BHLK.to(keys.dtype), keys, values, mask, 0.0)
        return self._linear(y_BHLK.transpose(1, 2).reshape(x_RD.shape).to(x_RD.dtype), part.out)

    def _linear(self, x_RD: Tensor, part: nn.Linear, *, gelu: bool = False) -> Tensor:
        return self._matmul(x_RD, part.weight, part.bias, gelu=gelu)

    def _matmul(self, x_RD: Tensor, weight_ND: Tensor, bias_N: Tensor | None, *, gelu: bool = False) -> Tensor:
        """x · weightᵀ + bias `(R, N)`, with GELU if asked."""
        rows, (outputs, inputs) = len(x_RD), weight_ND.shape
        if rows > self._kernels.FEW_ROWS:
            return _linear_and_gelu(x_RD, weight_ND, bias_N) if gelu else F.linear(x_RD, weight_ND, bias_N)
        weight_ND, scale_N = int8_parts(weight_ND) or (weight_ND, None)
        y_RN = x_RD.new_empty(rows, outputs)
        lines = -(-_OUTPUTS * inputs * weight_ND.itemsize // self._kernels.LINE)
        self._kernels.linear_of_few_rows[(-(-outputs // _OUTPUTS),)](
            x_RD, weight_ND, scale_N, bias_N, y_RN, outputs, inputs,
            ROWS=rows, SCALE=scale_N is not None, BIAS=bias_N is not None, GELU=gelu,
            BLOCK_N=_OUTPUTS, BLOCK_J=min(_THREADS, self._power_of_2(-(-inputs // _INPUTS_OF_THREAD))),
            BLOCK_I=_INPUTS_OF_THREAD, LINES=self._power_of_2(lines), num_warps=_WARPS, **self._launch,
        )  # fmt: skip
        return y_RN

    def _close_and_open(
        self, x_RD: Tensor, branch_RD: Tensor, residual: Residual | None, following: LayerNorm
    ) -> Tensor:
        """Add the branch, after its norm if it has one, to x in place; returns the next norm of x."""
        rows, hidden_size = x_RD.shape
        norm = residual.norm_branch if residual is not None and isinstance(residual.norm_branch, LayerNorm) else None
        y_RD = torch.empty_like(x_RD)
        self._kernels.close_and_open[(rows,)](
            x_RD, branch_RD, y_RD, norm and norm.weight, norm and norm.bias, following.weight, following.bias,
            hidden_size, following.eps, BRANCH_NORM=norm is not None, BLOCK=self._power_of_2(hidden_size), **self._norm,
            num_warps=_WARPS, **self._launch,
        )  # fmt: skip
        return y_RD

    def _attend_one(self, qkv_BN: Tensor, cache: StaticKVCache, layer: int, head_size: int) -> Tensor:
        """Attention `(B, D)` of one new position per row; stores its keys and values in the cache."""
        keys_BHSK, values_BHSK = cache.keys_and_values(layer)
        batch, heads, reach, _ = keys_BHSK.shape
        parts = min(-(-reach // _POSITIONS), -(-_PROGRAMS_OF_ATTENTION // (batch * heads)))
        block = self._power_of_2(head_size)
        y_BD = qkv_BN.new_empty(batch, heads * head_size)
        shares = torch.empty(batch * heads, parts, block + 2, dtype=torch.float32, device=y_BD.device)
        self._kernels.attend[(batch * heads, parts)](
            qkv_BN, keys_BHSK, values_BHSK, cache.lengths, y_BD, shares, cache.arrived,
            heads, keys_BHSK.stride(0), keys_BHSK.stride(1), head_size**-0.5,
            HEAD=head_size, BLOCK_K=block, BLOCK_S=_POSITIONS, PARTS=parts, PARTS_2=self._power_of_2(parts),
            num_warps=_WARPS_OF_ATTENTION, **self._launch,
        )  # fmt: skip
        return y_BD


def _linear_and_gelu(x_RD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """GELU, in its tanh form, of x · weightᵀ + bias; on a GPU cuBLAS applies it before it rounds and stores."""
    if on_nvidia(x_RD.device) and bias_N is not None and type(weight_ND.data) is Tensor:
        # Private name of torch, checked against 2.14. Its GELU has the tanh form on a GPU alone.
        return torch._addmm_activation(bias_N, x_RD, weight_ND.T, use_gelu=True)
    return F.gelu(F.linear(x_RD, weight_ND, bias_N), approximate="tanh")
