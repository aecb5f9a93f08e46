"""Options of the transformer, of its training, and of LoRA: the schema of `conf/model` and `conf`'s `lora`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cogview_pl.limits import MISSING, above_0, at_least_0, count, share_below_1


class Norm(Enum):
    """Placement of LayerNorm."""

    pre = "pre"
    post = "post"
    sandwich = "sandwich"


class NormScope(Enum):
    """Scope of the PB-Relax maximum in LayerNorm."""

    none = "none"
    token = "token"
    tensor = "tensor"


class AttentionForm(Enum):
    """How attention is computed."""

    fused = "fused"
    pb_relax = "pb_relax"
    naive = "naive"


class ActivationCheckpointing(Enum):
    """What the backward pass of stage 2 computes anew instead of keeping it."""

    none = "none"
    selective = "selective"
    block = "block"


class LoRATarget(Enum):
    """What LoRA can train beside."""

    qkv = "qkv"
    out = "out"
    up = "up"
    down = "down"
    tokens = "tokens"


@dataclass
class TransformerConfig:
    """Stage 2: the transformer."""

    num_layers: int = count()
    hidden_size: int = count()
    num_heads: int = count()
    num_positions: int = count()
    norm: Norm = MISSING
    norm_scope: NormScope = MISSING
    attention: AttentionForm = MISSING
    dropout: float = share_below_1()
    init_std: float = at_least_0()


@dataclass
class LoRAConfig:
    """Small trained matrices beside frozen weights."""

    rank: int = at_least_0()
    alpha: float = above_0()
    targets: list[LoRATarget] = MISSING
    merge: bool = MISSING
