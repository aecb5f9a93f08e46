"""The sequence model: a GPT over the joint vocabulary (paper §2.2), stable in fp16 (§2.4).

Shapes: B batch, L length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.transformer.activation_checkpointing import RECOMPUTE
from cogview_pl.transformer.attention import AttentionFunction
from cogview_pl.transformer.block import Block, Cache, LayerNorm
from cogview_pl.transformer.hidden_state_cache import HiddenStateCache
from cogview_pl.transformer.kv_cache import KVCache


class ParameterGroups(NamedTuple):
    """Parameters that optimizers treat differently."""

    matrices: list[nn.Parameter]
    """Of linear maps, `(outputs, inputs)`; with weight decay."""
    tables: list[nn.Parameter]
    """Embeddings, of which the first is the output matrix as well; with weight decay."""
    vectors: list[nn.Parameter]
    """Biases and LayerNorms; without weight decay."""


class Transformer(nn.Module):
    """Decoder-only transformer with learned positions that are given explicitly and tied embeddings.

    Args:
        vocab_size: V, rows of the embedding table, which is also the output matrix.
        num_layers: number of blocks.
        hidden_size: D.
        num_heads: heads; they divide D.
        num_positions: rows of the position table, i.e. the largest position id plus one.
        norm: `sandwich` (CogView), `pre` or `post`.
        norm_scope: scope of the PB-Relax maximum: `token`, `tensor` (the original) or `none` (plain LayerNorm).
        attention: `fused`, `pb_relax` (the explicit formula) or `naive`.
        dropout: probability on embeddings, attention weights and branch outputs.
        init_std: standard deviation of fresh matrices and tables; 0.02 in the original, whose D is 2560 = 1/0.02².
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        num_positions: int,
        norm: str = "sandwich",
        norm_scope: str = "token",
        attention: str = "fused",
        dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.sharded = False  # over several devices, by `transformer.parallel`
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(num_positions, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, norm=norm, norm_scope=norm_scope, attention=attention, dropout=dropout)
            for _ in range(num_layers)
        )
        self.final_norm = LayerNorm(hidden_size, norm_scope)
        self._initialise(init_std)

    @property
    def num_positions(self) -> int:
        """Number of position ids."""
        return self.position_embedding.num_embeddings

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits `(B, L, V)` of the next token at every position.

        Args:
            tokens: int64 `(B, L)`, ids below V.
            positions: int64 `(B, L)`, ids below `num_positions`; None counts 0, 1, 2, …
        """
        return self.logits(self.hidden(tokens, positions))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        attentions: Sequence[AttentionFunction] | None = None,
    ) -> Tensor:
        """Final normalised hidden states `(B, L, D)`.

        With a cache, the tokens continue the rows stored in it; their keys and values are added to it, and the
        caller counts them with `cache.advance`. `attentions`, one per block, take the place of the model's own for
        this pass (sparse training draws new pivots every time).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x_BLD = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        mask = None if cache is None else cache.mask(tokens.shape[1])
        functions: Sequence[AttentionFunction | None] = attentions or [None] * len(self.blocks)
        for layer, (block, attend) in enumerate(zip(self.blocks, functions, strict=True)):
            x_BLD = block(x_BLD, mask, cache, layer, attend)
        return self.final_norm(x_BLD)

    def logits(self, hidden: Tensor, ids: Sequence[range] | None = None) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)` over the given id ranges (None: all V).

        Only those rows of the head are multiplied; column j is the j-th id of the ranges put end to end.
        """
        head_VD = self.token_embedding.weight
        if ids is None:
            return F.linear(hidden, head_VD)
        return torch.cat([F.linear(hidden, head_VD[span.start : span.stop]) for span in ids], -1)

    @property
    def norm_scope(self) -> str:
        """Scope of the PB-Relax maximum."""
        return self.final_norm.scope

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for this model, in the precision that its linear maps compute in; on a CPU in fp32.

        CPU kernels of attention are four to eight times slower on 16-bit keys than on fp32 ones.
        With `norm_scope="tensor"`, where keys cannot be kept, it is a `HiddenStateCache`.
        """
        if self.norm_scope == "tensor":
            return HiddenStateCache(len(self.blocks))
        weight, first = self.token_embedding.weight, self.blocks[0]
        assert isinstance(first, Block)
        device = weight.device.type
        dtype = torch.float32 if device == "cpu" else weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return KVCache(
            num_layers=len(self.blocks),
            batch=batch,
            num_heads=first.attention.num_heads,
            capacity=capacity,
            head_size=first.attention.head_size,
            dtype=dtype,
            device=weight.device,
        )

    def set_training_pass(self, *, recompute: str = "none", compiled: bool = False) -> None:
        """How blocks run where gradients are taken; results stay the same, and names of weights too.

        Args:
            recompute: what the backward pass computes anew instead of keeping it: `none`, `selective` (all but
                matrix products and fused attention) or `block` (all inside a block).
            compiled: by torch.compile, one block at a time.
        """
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute}")
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute, block.compiled = recompute, compiled

    def parameter_groups(self) -> ParameterGroups:
        """The parameters by what they are, for the optimizer."""
        tables = [*self.token_embedding.parameters(), *self.position_embedding.parameters()]
        inner = [*self.blocks.parameters(), *self.final_norm.parameters()]
        return ParameterGroups([p for p in inner if p.ndim > 1], tables, [p for p in inner if p.ndim <= 1])

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        """Normal(0, std); matrices that write into the residual stream are smaller by √(2 · layers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(0.0, std / (math.sqrt(2 * len(self.blocks)) if writes else 1.0))
            elif name.endswith(".bias"):
                parameter.zero_()
