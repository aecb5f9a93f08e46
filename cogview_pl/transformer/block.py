"""One transformer block: LayerNorm with PB-Relax, its placements (pre, post, sandwich), attention and MLP.

Shapes: B batch, L length, D hidden size, H heads, K head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels import cpu_training
from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.transformer.activation_checkpointing import training_forward
from cogview_pl.transformer.attention import ATTENTIONS
from cogview_pl.transformer.config import ActivationCheckpointing, Norm, NormScope, TransformerConfig
from cogview_pl.transformer.hidden_state_cache import HiddenStateCache
from cogview_pl.transformer.kv_cache import KVCache, StaticKVCache
from cogview_pl.transformer.packing import PackedSequences

Cache = KVCache | StaticKVCache | HiddenStateCache
"""State that decoding keeps between steps."""

NORM_TARGET = 8.0  # PB-Relax scales the largest |x| to this, as in the released models
SMALLEST_MAXIMUM = 1e-4  # of a token: keeps an all-zero one unchanged; fp16 can represent it even after division by 8


class LayerNorm(nn.LayerNorm):
    """LayerNorm(x / (max|x| / 8)): LayerNorm with PB-Relax, paper §2.4 (eps 1e-5).

    LayerNorm does not depend on the scale of its input, but the sum of squares overflows fp16 for values above
    ~10⁴; the division prevents that. The gradient treats the divisor as a constant.

    Args:
        hidden_size: D.
        scope: `token` takes the maximum per position, so a result does not depend on the rest of the batch;
            `tensor` takes it over the whole input, as the original program does; `none` is the plain LayerNorm.
            Tokens below 8e-4 are divided by that, with `tensor` by their maximum, however small (zeros stay zeros).

    Attributes:
        cpu_kernels: whether training on a CPU uses `kernels.cpu_training`.
    """

    cpu_kernels = False

    def __init__(self, hidden_size: int, scope: NormScope) -> None:
        super().__init__(hidden_size, eps=1e-5)
        self.scope = NormScope(scope)  # refuses other values

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of a tensor of any shape (…, D)."""
        if self.scope == NormScope.none:
            return super().forward(input)
        smallest, eps = SMALLEST_MAXIMUM * NORM_TARGET, self.eps / NORM_TARGET**2
        if self.cpu_kernels and self.scope == NormScope.token and cpu_training.can_run(input, self.weight):
            return cpu_training.layer_norm(input, self.weight, self.bias, smallest, eps)
        dim = -1 if self.scope == NormScope.token else None
        maximum = _largest(input.detach() if input.requires_grad else input, dim)
        divisor = maximum.clamp(min=smallest) if dim is not None else maximum.masked_fill(maximum == 0, 1)
        # Scaling to 1 instead of 8, with eps in proportion, gives the same numbers and saves one pass.
        scaled = input / divisor
        return F.layer_norm(scaled, self.normalized_shape, self.weight, self.bias, eps)


def _largest(x: Tensor, dim: int | None) -> Tensor:
    """Largest |x| along an axis, which is kept, or of all (None)."""
    if x.device.type == "cpu":
        return x.abs().amax(dim, keepdim=True) if dim is not None else x.abs().amax()
    return torch.linalg.vector_norm(x, math.inf, dim=dim, keepdim=dim is not None)  # one pass, but one thread on a CPU


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection to queries, keys and values.

    Attributes:
        num_heads: heads on this device: all, or a part (`transformer.parallel`).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_size = config.hidden_size // config.num_heads
        self.dropout = config.dropout
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = Linear(config.hidden_size, config.hidden_size)
        self.function = ATTENTIONS[config.attention]

    def forward(self, x_BLD: Tensor, mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        """Attend over the new positions and, with a cache, over all stored positions too."""
        projected = self.project(x_BLD)
        if cache is None:
            q_BHLK, k_BHSK, v_BHSK = projected.unbind()
        else:
            k_BHSK, v_BHSK = cache.store(layer, projected.narrow(0, 1, 2))
            q_BHLK = projected.select(0, 0).to(k_BHSK.dtype)
        y_BHLK = self.function(q_BHLK, k_BHSK, v_BHSK, mask, self.dropout if self.training else 0.0)
        return self.out(y_BHLK.transpose(1, 2).flatten(2).to(projected.dtype))

    def packed(self, x_ND: Tensor, sequences: PackedSequences) -> Tensor:
        """Attend inside packed sequences; `(N, D)`, before the output map."""
        return cpu_training.causal_attention(self.qkv(x_ND), sequences.starts, sequences.longest, self.num_heads)

    def project(self, x_BLD: Tensor) -> Tensor:
        """Queries, keys and values, `(3, B, H, L, K)`."""
        batch, length, _ = x_BLD.shape
        return self.qkv(x_BLD).view(batch, length, 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)


class GELU(nn.Module):
    """GELU in its tanh form.

    Attributes:
        cpu_kernels: whether training on a CPU uses `kernels.cpu_training`.
    """

    cpu_kernels = False

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to each number."""
        if self.cpu_kernels and cpu_training.can_run(input):
            return cpu_training.gelu(input)
        return F.gelu(input, approximate="tanh")


class MLP(nn.Module):
    """Linear map to 4 · D, GELU (tanh form), linear map back to D."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = Linear(hidden_size, 4 * hidden_size)
        self.gelu = GELU()
        self.down = Linear(4 * hidden_size, hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map each position independently."""
        return self.down(self.gelu(self.up(x_BLD)))


class Residual(nn.Module):
    """Normalisation around a branch f of a block.

    `sandwich`: x + LN(f(LN(x))) (paper §2.4); `pre`: x + f(LN(x)); `post`: LN(x + f(x)).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

        def norm(*placements: Norm) -> nn.Module:
            used = Norm(config.norm) in placements
            return LayerNorm(config.hidden_size, config.norm_scope) if used else nn.Identity()

        self.norm_in = norm(Norm.pre, Norm.sandwich)
        self.norm_branch = norm(Norm.sandwich)
        self.norm_sum = norm(Norm.post)
        self.dropout = nn.Dropout(config.dropout)

    def open(self, x_BLD: Tensor) -> Tensor:
        """Input of the branch."""
        return self.norm_in(x_BLD)

    def close(self, x_BLD: Tensor, branch_BLD: Tensor) -> Tensor:
        """Residual stream with the branch's output added."""
        return self.norm_sum(x_BLD + self.norm_branch(self.dropout(branch_BLD)))


class Block(nn.Module):
    """Attention and MLP, each in its normalised residual branch.

    Attributes:
        checkpointing, compiled: form of the training pass; see `training_forward`.
    """

    checkpointing = ActivationCheckpointing.none
    compiled = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_residual = Residual(config)
        self.mlp = MLP(config.hidden_size)
        self.mlp_residual = Residual(config)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        sequences: PackedSequences | None = None,
        due_M: Tensor | None = None,
    ) -> Tensor:
        """Residual stream in, residual stream out, both `(B, L, D)`.

        Of packed sequences both are `(N, D)`; with `due_M` only these rows come out, `(M, D)`.
        """
        if sequences is not None:
            return self._run_packed(x_BLD, sequences, due_M)
        # Inside `forward`, so that hooks on a block (callbacks use them) run once and outside of compiled code.
        special = self.compiled or self.checkpointing != ActivationCheckpointing.none
        if special and cache is None and torch.is_grad_enabled():
            return training_forward(self, x_BLD, self.checkpointing, compiled=self.compiled)
        return self.run(x_BLD, mask, cache, layer)

    def run(self, x_BLD: Tensor, mask: Tensor | None = None, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """`forward` without activation checkpointing and compilation."""
        if isinstance(cache, HiddenStateCache):
            cache.recall(layer, x_BLD, self._keys_and_values)
        branch_BLD = self.attention(self.attention_residual.open(x_BLD), mask, cache, layer)
        x_BLD = self.attention_residual.close(x_BLD, branch_BLD)
        return self.mlp_residual.close(x_BLD, self.mlp(self.mlp_residual.open(x_BLD)))

    def _run_packed(self, x_ND: Tensor, sequences: PackedSequences, due_M: Tensor | None) -> Tensor:
        y_ND = self.attention.packed(self.attention_residual.open(x_ND), sequences)
        if due_M is not None:  # only attention reads other positions
            x_ND, y_ND = x_ND[due_M], y_ND[due_M]
        x_ND = self.attention_residual.close(x_ND, self.attention.out(y_ND))
        return self.mlp_residual.close(x_ND, self.mlp(self.mlp_residual.open(x_ND)))

    def _keys_and_values(self, x_BSD: Tensor) -> Tensor:
        return self.attention.project(self.attention_residual.open(x_BSD))[1:]
