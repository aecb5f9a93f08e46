"""LoRA: a small trained map beside each frozen one (Hu et al. 2021, arxiv.org/abs/2106.09685).

Shapes: D inputs, M outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from cogview_pl.linear import Linear, linear
from cogview_pl.transformer.model import Transformer

TARGETS = {"qkv": "attention.qkv", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
"""Linear maps of a block that can be adapted, and their names in it."""


class LoRALinear(Linear):
    """x · (W + α/R · B · A)ᵀ + bias, in which A `(R, D)` and B `(M, R)` are trained, and W and bias frozen.

    B starts at zero, so a fresh adapter changes nothing. A and B are fp32 whatever W is held in. Weight and bias have
    the names that they have in the map that this one replaces.

    Args:
        base: the map to adapt; it stays as it is, and its memory is shared where `held` is its precision.
        rank: R.
        alpha: α.
        held: precision of W and bias. Half of it under autocast to the same, which would round W for every product
            anyway, and the backward pass keep the rounded copy.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, held: torch.dtype = torch.float32) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = (
            nn.Parameter(parameter.detach().to(held), requires_grad=False) for parameter in (base.weight, base.bias)
        )
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # uniform within ±1/√D, as nn.Linear starts

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape (…, D) to (…, M)."""
        beside = linear(linear(input, self.lora_a) * self.scale, self.lora_b)
        return super().forward(input.to(self.weight.dtype)) + beside

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + α/R · B · A, `(M, D)`, fp32."""
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


def add_lora(
    model: Transformer, *, rank: int, alpha: float, targets: Sequence[str], held: torch.dtype = torch.float32
) -> None:
    """Freeze a model and put adapters beside the named maps of every block, in place.

    Args:
        model: without adapters.
        rank, alpha, held: see `LoRALinear`.
        targets: some of `TARGETS`.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for target in targets:
            part, name = TARGETS[target].split(".")
            parent = block.get_submodule(part)
            base = parent.get_submodule(name)
            assert isinstance(base, nn.Linear)
            setattr(parent, name, LoRALinear(base, rank=rank, alpha=alpha, held=held))


def adapter_state(model: Transformer) -> dict[str, Tensor]:
    """What is trained of a model with adapters, by the names of its `state_dict`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_shapes(model: Transformer, *, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Shapes of all that `adapter_state` gives once adapters were added to a model."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer, block in enumerate(model.blocks):
        for path in (TARGETS[target] for target in targets):
            outputs, inputs = block.get_submodule(path).weight.shape  # type: ignore[union-attr, misc]
            shapes[f"blocks.{layer}.{path}.lora_a"] = (rank, inputs)
            shapes[f"blocks.{layer}.{path}.lora_b"] = (outputs, rank)
    return shapes


def merged(model: Transformer, adapter: Mapping[str, Tensor], alpha: float) -> Transformer:
    """A plain model with an adapter added into its weights.

    It shares the weights that no adapter belongs to with `model`, which stays as it is.

    Args:
        model: the model that the adapter was trained beside, without it.
        adapter: matrices as `adapter_state` gives them.
        alpha: α.
    """
    replaced: dict[int, nn.Parameter] = {}
    for name in {name.rpartition(".")[0] for name in adapter}:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapted = LoRALinear(base, rank=len(adapter[f"{name}.lora_a"]), alpha=alpha)
        adapted.load_state_dict({kind: adapter[f"{name}.{kind}"] for kind in ("lora_a", "lora_b")}, strict=False)
        replaced[id(base.weight)] = nn.Parameter(adapted.merged_weight())
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return deepcopy(model, {**shared, **replaced})
