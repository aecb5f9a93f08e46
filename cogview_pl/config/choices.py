"""Keys of the configuration that take one of a few names."""

from __future__ import annotations

from enum import Enum


class Verb(Enum):
    """What a task does; each is a file in `cogview_pl/tasks/`."""

    fit_image_tokenizer = "fit_image_tokenizer"
    fit_sequence_model = "fit_sequence_model"
    tokenize = "tokenize"
    generate = "generate"
    rerank = "rerank"
    magnify = "magnify"
    fit_features = "fit_features"
    evaluate = "evaluate"
    convert = "convert"
    chain = "chain"


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


class Algorithm(Enum):
    """How many codes a pass of the model yields in generation."""

    sequential = "sequential"
    jacobi = "jacobi"


class AttentionForm(Enum):
    """How attention is computed."""

    fused = "fused"
    pb_relax = "pb_relax"
    naive = "naive"


class StoreFormat(Enum):
    """Rows of a token store on disk."""

    native = "native"
    cogview = "cogview"


class TokenSource(Enum):
    """Where stage 2 finds its tokens when no store is named."""

    tokenize = "tokenize"
    images = "images"


class Reconstruction(Enum):
    """Distance between a image and its reconstruction."""

    l1 = "l1"
    l2 = "l2"


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


class StrategyKind(Enum):
    """How a run uses its devices."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed_2 = "deepspeed_2"
    deepspeed_3 = "deepspeed_3"
    tp = "tp"

    @property
    def spreads(self) -> bool:
        """Whether no device has all gradients and optimizer states."""
        return self not in (StrategyKind.single, StrategyKind.ddp)


class Quantization(Enum):
    """How matrices are held for inference."""

    int8 = "int8"
    int4 = "int4"
