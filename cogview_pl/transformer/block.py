"""One transformer block: LayerNorm with PB-Relax, its placements (pre, post, sandwich), attention and MLP.

Shapes: B batch, L length, D hidden size, H heads, K head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.transformer.activation_checkpointing import training_pass
from cogview_pl.transformer.attention import ATTENTIONS, AttentionFunction
from cogview_pl.transformer.hidden_state_cache import HiddenStateCache
from cogview_pl.transformer.kv_cache import KVCache, StaticKVCache

Cache = KVCache | StaticKVCache | HiddenStateCache
"""What decoding keeps between steps."""

NORM_PLACEMENTS = ("pre", "post", "sandwich")
NORM_SCOPES = ("none", "token", "tensor")

NORM_TARGET = 8.0  # PB-Relax brings the largest |x| to this, as the released models do
SMALLEST_MAXIMUM = 1e-4  # an all-zero vector is left alone; representable in fp16 even after dividing by 8


class LayerNorm(nn.LayerNorm):
    """LayerNorm(x / (max|x| / 8)), the PB-Relax form of the paper's §2.4 (eps 1e-5).

    LayerNorm does not depend on the scale of its input, but its sum of squares overflows fp16 for values above
    ~10⁴; dividing first removes that. The divisor is a constant for the gradient.

    Args:
        hidden_size: D.
        scope: `token` takes the maximum per position, so that a result depends on nothing else in the batch;
            `tensor` over the whole input, as the original does; `none` is the plain LayerNorm.
    """

    def __init__(self, hidden_size: int, scope: str) -> None:
        super().__init__(hidden_size, eps=1e-5)
        if scope not in NORM_SCOPES:
            raise ValueError(f"scope must be one of {', '.join(NORM_SCOPES)}, got {scope}")
        self.scope = scope

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of a tensor of any shape (…, D)."""
        if self.scope == "none":
            return super().forward(input)
        dim = -1 if self.scope == "token" else None
        maximum = _largest(input.detach() if input.requires_grad else input, dim)
        # Brought to 1 instead of 8, with eps in proportion: the same numbers, and one pass less.
        scaled = input / maximum.clamp(min=SMALLEST_MAXIMUM * NORM_TARGET)
        return F.layer_norm(scaled, self.normalized_shape, self.weight, self.bias, self.eps / NORM_TARGET**2)


def _largest(x: Tensor, dim: int | None) -> Tensor:
    """Largest |x| along an axis, which is kept, or of all (None)."""
    if x.device.type == "cpu":
        return x.abs().amax(dim, keepdim=True) if dim is not None else x.abs().amax()
    return torch.linalg.vector_norm(x, math.inf, dim=dim, keepdim=dim is not None)  # one pass, but one thread on a CPU


class Attention(nn.Module):
    """Causal multi-head self-attention with one fused projection to queries, keys and values.

    `num_heads` are those that this process computes: all of them, or its part (`transformer.parallel`).
    """

    def __init__(self, hidden_size: int, num_heads: int, *, attention: str, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = hidden_size // num_heads
        self.dropout = dropout
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.out = Linear(hidden_size, hidden_size)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention}")
        self.function = ATTENTIONS[attention]

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        attend: AttentionFunction | None = None,
    ) -> Tensor:
        """Attend over the new positions and, with a cache, over everything stored before them.

        `attend` takes the place of the layer's own attention function for this call.
        """
        projected = self.project(x_BLD)
        if cache is None:
            q_BHLK, k_BHSK, v_BHSK = projected.unbind()
        else:
            k_BHSK, v_BHSK = cache.store(layer, projected.narrow(0, 1, 2))
            q_BHLK = projected.select(0, 0).to(k_BHSK.dtype)
        dropout = self.dropout if self.training else 0.0
        y_BHLK = (attend or self.function)(q_BHLK, k_BHSK, v_BHSK, mask, dropout)
        return self.out(y_BHLK.transpose(1, 2).flatten(2).to(projected.dtype))

    def project(self, x_BLD: Tensor) -> Tensor:
        """Queries, keys and values, `(3, B, H, L, K)`."""
        batch, length, _ = x_BLD.shape
        return self.qkv(x_BLD).view(batch, length, 3, self.num_heads, self.head_size).permute(2, 0, 3, 1, 4)


class MLP(nn.Module):
    """Two linear maps with a four times wider GELU (tanh form) between them."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = Linear(hidden_size, 4 * hidden_size)
        self.gelu = nn.GELU("tanh")
        self.down = Linear(4 * hidden_size, hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map every position by itself."""
        return self.down(self.gelu(self.up(x_BLD)))


class Residual(nn.Module):
    """The normalisation around one branch f of a block.

    `sandwich`: x + LN(f(LN(x))) (the paper's §2.4); `pre`: x + f(LN(x)); `post`: LN(x + f(x)).
    """

    def __init__(self, hidden_size: int, *, norm: str, norm_scope: str, dropout: float) -> None:
        super().__init__()
        if norm not in NORM_PLACEMENTS:
            raise ValueError(f"norm must be one of {', '.join(NORM_PLACEMENTS)}, got {norm}")
        self.norm_in = LayerNorm(hidden_size, norm_scope) if norm in ("pre", "sandwich") else nn.Identity()
        self.norm_branch = LayerNorm(hidden_size, norm_scope) if norm == "sandwich" else nn.Identity()
        self.norm_sum = LayerNorm(hidden_size, norm_scope) if norm == "post" else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def open(self, x_BLD: Tensor) -> Tensor:
        """What the branch sees."""
        return self.norm_in(x_BLD)

    def close(self, x_BLD: Tensor, branch_BLD: Tensor) -> Tensor:
        """The branch added to the stream."""
        return self.norm_sum(x_BLD + self.norm_branch(self.dropout(branch_BLD)))


class Block(nn.Module):
    """Attention and MLP, each inside its normalised residual branch.

    `recompute` (one of `RECOMPUTE`) and `compiled` say how it runs where gradients are taken; see `training_pass`.
    """

    recompute = "none"
    compiled = False

    def __init__(
        self, hidden_size: int, num_heads: int, *, norm: str, norm_scope: str, attention: str, dropout: float
    ) -> None:
        super().__init__()
        self.attention = Attention(hidden_size, num_heads, attention=attention, dropout=dropout)
        self.attention_residual = Residual(hidden_size, norm=norm, norm_scope=norm_scope, dropout=dropout)
        self.mlp = MLP(hidden_size)
        self.mlp_residual = Residual(hidden_size, norm=norm, norm_scope=norm_scope, dropout=dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        layer: int,
        attend: AttentionFunction | None = None,
    ) -> Tensor:
        """Residual stream in, residual stream out, both `(B, L, D)`."""
        # Below `forward`, so that hooks on a block (what callbacks look at) run once and outside of compiled code.
        if cache is None and torch.is_grad_enabled() and (self.compiled or self.recompute != "none"):
            return training_pass(self, x_BLD, attend, recompute=self.recompute, compiled=self.compiled)
        return self._run(x_BLD, mask, cache, layer, attend)

    def whole(self, x_BLD: Tensor, attend: AttentionFunction | None) -> Tensor:
        """`forward` over whole sequences, without a cache."""
        return self._run(x_BLD, None, None, 0, attend)

    def _run(
        self, x_BLD: Tensor, mask: Tensor | None, cache: Cache | None, layer: int, attend: AttentionFunction | None
    ) -> Tensor:
        if isinstance(cache, HiddenStateCache):
            cache.recall(layer, x_BLD, self._keys_and_values)
        branch_BLD = self.attention(self.attention_residual.open(x_BLD), mask, cache, layer, attend)
        x_BLD = self.attention_residual.close(x_BLD, branch_BLD)
        return self.mlp_residual.close(x_BLD, self.mlp(self.mlp_residual.open(x_BLD)))

    def _keys_and_values(self, x_BSD: Tensor) -> Tensor:
        return self.attention.project(self.attention_residual.open(x_BSD))[1:]
