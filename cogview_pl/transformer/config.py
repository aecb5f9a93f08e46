"""Options of the transformer, of its training and of LoRA: the schema of `conf/model` and of the key `lora`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cogview_pl.limits import MISSING, above_0, at_least_0, count, share_below_1, whole


class Norm(Enum):
    """Placement of LayerNorm around a branch f; see `transformer.block.Residual`."""

    pre = "pre"
    post = "post"
    sandwich = "sandwich"


class NormScope(Enum):
    """Values that LayerNorm takes the PB-Relax maximum over: none, those of a token, or the whole tensor."""

    none = "none"
    token = "token"
    tensor = "tensor"


class AttentionForm(Enum):
    """Formula of attention; see `transformer.attention`."""

    fused = "fused"
    pb_relax = "pb_relax"
    naive = "naive"


class ActivationCheckpointing(Enum):
    """Activations that the backward pass recomputes.

    `none`; `selective`: all but the results of matmuls and fused attention; `block`: all inside a block.
    """

    none = "none"
    selective = "selective"
    block = "block"


class LoRATarget(Enum):
    """Weights that LoRA adapts: four linear maps of every block, and the token embedding (which is the lm_head too)."""

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
    init_std: float | None = at_least_0()

    @property
    def weight_std(self) -> float:
        """Standard deviation of new weights: `init_std`, or 1/sqrt(hidden_size) rounded to three decimals.

        The rounding gives the 0.02 of the released models, whose hidden size is 2560.
        """
        return round(self.hidden_size**-0.5, 3) if self.init_std is None else self.init_std


@dataclass
class LoRAConfig:
    """Trained low-rank matrices added to frozen weights."""

    rank: int = whole()
    alpha: float = above_0()
    targets: list[LoRATarget] = MISSING
    merge: bool = MISSING
