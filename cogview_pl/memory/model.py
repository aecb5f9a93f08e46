"""The sequence model as one device has it: with its adapters, and its part of the matrices under tensor parallelism."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from cogview_pl.checkpoints.model_folder import build_transformer
from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.memory.trace import default_dtype
from cogview_pl.transformer.config import LoRAConfig
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Model:
    """What is needed to build it.

    Attributes:
        settings: constructor arguments of the transformer, as pairs.
        weights: dtype of the weights.
        lora: fields of `LoRAConfig` and `held`, as pairs; empty for none.
        parts: devices that the heads and the inner units are divided among; 1: whole.
    """

    settings: Pairs
    weights: torch.dtype
    lora: Pairs = ()
    parts: int = 1

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], weights: torch.dtype, lora: Mapping[str, Any] | None = None, parts: int = 1
    ) -> Model:
        """From mappings."""
        fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in (lora or {}).items()}
        return cls(tuple(sorted(settings.items())), weights, tuple(sorted(fixed.items())), parts)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return int(dict(self.settings)["num_layers"])

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(dict(self.settings)["hidden_size"])

    def build(self, layers: int | None = None) -> Transformer:
        """The model, of fewer blocks if need be, on the default device."""
        settings = dict(self.settings)
        with default_dtype(self.weights):
            model = build_transformer({**settings, "num_layers": layers or self.layers})
            if self.parts > 1:
                _narrow(model, self.parts)
        if self.lora:
            options = dict(self.lora)
            held = options.pop("held", torch.float32)
            add_lora(model, LoRAConfig(**{**options, "targets": list(options["targets"]), "merge": False}), held)
        return model


class Tensors(NamedTuple):
    """Trained tensors of one kind."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    matrices: bool
    """Whether an optimizer takes them for linear maps or filters (see `ParameterGroup`)."""
    number: int
    """How many there are."""

    @property
    def elements(self) -> int:
        """Of one of them."""
        return torch.Size(self.shape).numel()

    @property
    def size(self) -> int:
        """Bytes of one of them."""
        return self.elements * self.dtype.itemsize


class Counted(NamedTuple):
    """What a model consists of."""

    parameters: int
    bytes: int
    """Of all of them."""
    block_bytes: int
    """Of one block."""
    blocks: int
    """How many there are; 0 in an image tokenizer."""
    trained: tuple[Tensors, ...]

    @property
    def trained_parameters(self) -> int:
        """How many numbers change."""
        return sum(kind.elements * kind.number for kind in self.trained)

    @property
    def gradient_bytes(self) -> int:
        """Of all gradients."""
        return sum(kind.size * kind.number for kind in self.trained)


@cache
def counted(model: Model) -> Counted:
    """Parameters of a sequence model."""
    with torch.device("meta"):
        built = model.build()
    matrices, *others = built.parameter_groups()
    block = _size(built.blocks[0].parameters())
    return count(matrices, [p for group in others for p in group], block, model.layers)


def count(
    matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], block_bytes: int = 0, blocks: int = 0
) -> Counted:
    """Parameters of any model: linear maps and filters, and all others."""
    kinds: Counter[tuple[tuple[int, ...], torch.dtype, bool]] = Counter()
    for group, are_matrices in ((matrices, True), (others, False)):
        kinds.update((tuple(p.shape), p.dtype, are_matrices) for p in group if p.requires_grad)
    both = [*matrices, *others]
    return Counted(
        sum(p.numel() for p in both),
        _size(both),
        block_bytes,
        blocks,
        tuple(Tensors(*kind, number) for kind, number in kinds.items()),
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _narrow(model: Transformer, parts: int) -> None:
    """Leave in each block what `tensor_parallel` leaves one device."""
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        for parent, name, divided in (
            (attention, "qkv", "out_features"),
            (attention, "out", "in_features"),
            (mlp, "up", "out_features"),
            (mlp, "down", "in_features"),
        ):
            whole = getattr(parent, name)
            sizes = {"in_features": whole.in_features, "out_features": whole.out_features}
            sizes[divided] //= parts
            setattr(parent, name, Linear(**sizes))
        attention.num_heads = max(1, attention.num_heads // parts)  # type: ignore[union-attr, operator]
