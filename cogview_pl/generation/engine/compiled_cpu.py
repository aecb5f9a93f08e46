"""CPU form of the model by C++ (`kernels.cpu_decoding`): one call does a whole step of decoding.

Prompts and drafts, which have several new positions in a row, run through the model itself, with the same KV cache.

Shapes: R rows, L new positions, D hidden size, N outputs, n ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.generation.engine.threads import Threads
from cogview_pl.kernels.cpu_decoding import (
    NO_NORM,
    WIDTH,
    DecodingStep,
    LayerWeights,
    LinearMap,
    LinearWeights,
    NormWeights,
)
from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.kernels.torchao import int8_parts
from cogview_pl.transformer.attention import fused_attention
from cogview_pl.transformer.block import NORM_TARGET, SMALLEST_MAXIMUM, Block, Cache, LayerNorm, Residual
from cogview_pl.transformer.config import NormScope
from cogview_pl.transformer.kv_cache import KVCache
from cogview_pl.transformer.lora import LoRALinear
from cogview_pl.transformer.model import Transformer

_DTYPES = (torch.float32, torch.bfloat16)


def can_compile(model: Transformer) -> bool:
    """Whether the step covers the model: one CPU; fp32, bf16 or int8; fused attention, LayerNorm before each branch."""
    table, blocks = model.token_embedding.weight, list(model.blocks)
    return (
        table.device.type == "cpu"
        and table.dtype in _DTYPES
        and not model.sharded
        and model.norm_scope != NormScope.tensor
        and not torch.is_autocast_enabled("cpu")
        and table.shape[1] % WIDTH == 0
        and (table.shape[1] // model.num_heads) % WIDTH == 0
        and all(isinstance(block, Block) and _covers(block) for block in blocks)
        and len({_kind(part) for block in blocks for part in block.modules() if isinstance(part, nn.Linear)}) == 1
    )


class CompiledModel:
    """Hidden states and logits of a model, without gradients; see `can_compile`.

    Args:
        model: the sequence model, in evaluation mode; later changes of its weights are not all followed.
        ids: ranges that logits are computed over, end to end.
    """

    def __init__(self, model: Transformer, ids: Sequence[range]) -> None:
        self._model = copy(model)  # the modules of the model without itself, which may be freed
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        relax = model.norm_scope == NormScope.token
        self._step = DecodingStep(
            [_layer(block) for block in blocks],
            _norm(model.final_norm),
            num_heads=model.num_heads,
            smallest_maximum=SMALLEST_MAXIMUM * NORM_TARGET if relax else 0.0,
            eps=model.final_norm.eps / NORM_TARGET**2 if relax else model.final_norm.eps,
        )
        self._threads = Threads()
        table_VD = model.token_embedding.weight.detach()
        self._heads = [LinearMap(LinearWeights(table_VD[span.start : span.stop], None, None)) for span in ids]

    @property
    def threads(self) -> int:
        """Threads with which a step takes least time at present; its numbers do not depend on them."""
        return self._threads.number

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Final normalised hidden states `(R, L, D)`; see `Transformer.hidden`."""
        if tokens.shape[1] > 1 or not isinstance(cache, KVCache):
            return self._model.hidden(tokens, positions, cache).float()
        model = self._model
        x_RD = F.embedding(tokens[:, 0], model.token_embedding.weight).float()
        x_RD += F.embedding(positions[:, 0], model.position_embedding.weight)
        stored, lengths = cache.stored, cache.lengths
        return self._threads.run(lambda threads: self._step(x_RD, stored, lengths, threads))[:, None]

    def logits(self, hidden: Tensor, ids: Sequence[range] | None = None) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)`; `ids` are always those of the constructor."""
        hidden_RD = hidden.reshape(-1, hidden.shape[-1]).float().contiguous()
        parts = [head(hidden_RD, self.threads) for head in self._heads]
        logits_Rn = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return logits_Rn.view(*hidden.shape[:-1], -1)


def _covers(block: Block) -> bool:
    maps = [part for part in block.modules() if isinstance(part, nn.Linear)]
    residuals = (block.attention_residual, block.mlp_residual)
    return (
        block.attention.function is fused_attention
        and all(isinstance(residual.norm_in, LayerNorm) for residual in residuals)
        and all(_kind(part) is not None for part in maps)
    )


def _kind(part: nn.Linear) -> torch.dtype | None:
    """The dtype that a linear map is read in; None if the step cannot read it."""
    if type(part) is LoRALinear:
        return part.weight.dtype if part.weight.dtype in _DTYPES else None
    if int8_parts(part.weight) is not None:
        return torch.int8
    plain = type(part) is Linear and type(part.weight.data) is Tensor and part.weight.dtype in _DTYPES
    return part.weight.dtype if plain else None


def _layer(block: Block) -> LayerWeights:
    return LayerWeights(
        _norm(block.attention_residual.norm_in),
        _linear(block.attention.qkv),
        _linear(block.attention.out),
        _branch_norm(block.attention_residual),
        _norm(block.mlp_residual.norm_in),
        _linear(block.mlp.up),
        _linear(block.mlp.down),
        _branch_norm(block.mlp_residual),
    )


def _linear(part: nn.Linear) -> LinearWeights:
    """Weights of a linear map, in the memory of the model except for merged adapters."""
    bias = part.bias.detach().float()
    if isinstance(part, LoRALinear):
        return LinearWeights(part.merged_weight().to(part.weight.dtype).contiguous(), None, bias)
    int8 = int8_parts(part.weight)
    if int8 is not None:
        weight_ND, scale_N = int8
        return LinearWeights(weight_ND.contiguous(), scale_N.float().flatten(), bias)
    return LinearWeights(part.weight.detach().contiguous(), None, bias)


def _norm(norm: nn.Module) -> NormWeights:
    assert isinstance(norm, LayerNorm)
    return NormWeights(norm.weight.detach().float(), norm.bias.detach().float())


def _branch_norm(residual: Residual) -> NormWeights:
    return _norm(residual.norm_branch) if isinstance(residual.norm_branch, LayerNorm) else NO_NORM
