"""The transformer: a GPT over the joint vocabulary of text and image codes (paper §2.2), stable in fp16 (§2.4).

Shapes: B batch, L length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels import cpu_training
from cogview_pl.transformer.block import GELU, Block, Cache, LayerNorm
from cogview_pl.transformer.config import ActivationCheckpointing, AttentionForm, NormScope, TransformerConfig
from cogview_pl.transformer.hidden_state_cache import HiddenStateCache
from cogview_pl.transformer.kv_cache import KVCache
from cogview_pl.transformer.packing import pack


class ParameterGroups(NamedTuple):
    """Parameters by kind, since optimizers treat the kinds differently."""

    matrices: list[nn.Parameter]
    """Weights of linear maps, `(outputs, inputs)`; with weight decay."""
    tables: list[nn.Parameter]
    """Embeddings; the first is the lm_head too; with weight decay."""
    vectors: list[nn.Parameter]
    """Biases and LayerNorms; without weight decay."""


class Transformer(nn.Module):
    """Decoder-only transformer with explicit learned positions; the token embedding is the lm_head too.

    Args:
        config: sizes and forms; `num_positions` is the largest position id plus one.
        vocab_size: V, rows of the token embedding.

    Attributes:
        sharded: whether several devices share its weights (`transformer.parallel`).
        cpu_kernels: whether training on a CPU uses `kernels.cpu_training`.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`.
    """

    sharded = False

    def __init__(self, config: TransformerConfig, *, vocab_size: int) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}")
        self.num_heads = config.num_heads
        self.sharded = False  # over several devices, by `transformer.parallel`
        self.cpu_kernels = False
        self._fused = config.attention == AttentionForm.fused and config.norm_scope != NormScope.tensor
        self.token_embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = LayerNorm(config.hidden_size, config.norm_scope)
        self._initialise(config.weight_std)

    @property
    def num_positions(self) -> int:
        """Number of position ids."""
        return self.position_embedding.num_embeddings

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits `(B, L, V)` of the next token at every position.

        Args:
            tokens: int64 `(B, L)`, ids below V.
            positions: int64 `(B, L)`, ids below `num_positions`; None: 0, 1, 2, …
        """
        return self.logits(self.hidden(tokens, positions))

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Final normalised hidden states `(B, L, D)`.

        With a cache, the tokens continue the rows stored in it. Their keys and values are added to the cache; the
        caller counts them with `cache.advance`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x_BLD = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        mask = None if cache is None else cache.mask(tokens.shape[1])
        for layer, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, mask, cache, layer)
        return self.final_norm(x_BLD)

    def hidden_at(self, tokens: Tensor, positions: Tensor, due_BL: Tensor) -> Tensor:
        """Final normalised hidden states `(M, D)` of the positions that are due, in order.

        Args:
            tokens, positions: as for `forward`.
            due_BL: bool `(B, L)`.
        """
        if not self._packs(tokens.shape[1]):
            return self.hidden(tokens, positions)[due_BL]
        sequences = pack(due_BL)
        tokens_N, positions_N = (x.flatten()[sequences.kept_N] for x in (tokens, positions))
        x_ND = self.token_embedding(tokens_N) + self.position_embedding(positions_N)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x_ND = block(x_ND, None, None, layer, sequences, sequences.due_M if layer == last else None)
        return self.final_norm(x_ND)

    def logits(self, hidden: Tensor, ids: Sequence[range] | None = None) -> Tensor:
        """Logits `(…, n)` of hidden states `(…, D)` over the given id ranges (None: all V).

        The matmul takes only these rows of the lm_head; column j is the j-th id of the concatenated ranges.
        """
        lm_head_VD = self.token_embedding.weight
        if ids is None:
            return F.linear(hidden, lm_head_VD)
        return torch.cat([F.linear(hidden, lm_head_VD[span.start : span.stop]) for span in ids], -1)

    @property
    def norm_scope(self) -> NormScope:
        """Scope of the PB-Relax maximum."""
        return self.final_norm.scope

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty KV cache in the precision of the linear maps (of autocast, if enabled); fp32 on a CPU.

        CPU kernels of attention are four to eight times slower on 16-bit keys than on fp32 keys.
        With `norm_scope=tensor` keys cannot be kept, so it is a `HiddenStateCache`, as in the original program.
        """
        if self.norm_scope == NormScope.tensor:
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

    def set_activation_checkpointing(self, checkpointing: ActivationCheckpointing, *, compiled: bool = False) -> None:
        """Choose the form of the training pass of all blocks; results and names of weights stay the same.

        Args:
            checkpointing: activations that the backward pass recomputes.
            compiled: by torch.compile, one block at a time.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            block.checkpointing, block.compiled = ActivationCheckpointing(checkpointing), compiled

    def set_cpu_kernels(self, used: bool) -> None:
        """Whether training on a CPU in fp32 uses `kernels.cpu_training`, which must be prepared.

        Results are equal up to rounding.
        """
        self.cpu_kernels = used
        for module in self.modules():
            if isinstance(module, (LayerNorm, GELU)):
                module.cpu_kernels = used

    def _packs(self, length: int) -> bool:
        """Whether sequences of this length train without padding: by the compiled attention, and without dropout."""
        plain = all(
            isinstance(block, Block) and not block.compiled and block.checkpointing == ActivationCheckpointing.none
            for block in self.blocks
        )
        able = plain and self._fused and not (self.training and self.dropout.p)
        short = length <= cpu_training.LONGEST_ATTENTION
        return self.cpu_kernels and able and short and cpu_training.can_run(self.position_embedding.weight)

    def parameter_groups(self) -> ParameterGroups:
        """The parameters by kind, for the optimizer."""
        tables = [*self.token_embedding.parameters(), *self.position_embedding.parameters()]
        inner = [*self.blocks.parameters(), *self.final_norm.parameters()]
        return ParameterGroups([p for p in inner if p.ndim > 1], tables, [p for p in inner if p.ndim <= 1])

    @torch.no_grad()
    def _initialise(self, std: float) -> None:
        """Normal(0, std); for the matrices that write into the residual stream, std / √(2 · layers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(0.0, std / (math.sqrt(2 * len(self.blocks)) if writes else 1.0))
            elif name.endswith(".bias"):
                parameter.zero_()
