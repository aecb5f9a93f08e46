"""LoRA: a small trained map beside each frozen one (Hu et al. 2021, arxiv.org/abs/2106.09685).

Shapes: D inputs, M outputs, R rank; for the table of tokens D is the width and M the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels.cpu_linear import Linear, linear
from cogview_pl.transformer.model import Transformer

TARGETS = ("qkv", "out", "up", "down", "tokens")
"""What can be adapted: the linear maps of all blocks, and the table of tokens, which is the output matrix as well."""

_IN_A_BLOCK = {"qkv": "attention.qkv", "out": "attention.out", "up": "mlp.up", "down": "mlp.down"}
_TABLE = "token_embedding"


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
        self.lora_a, self.lora_b = _fresh(base.weight, rank)

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape (…, D) to (…, M)."""
        beside = linear(linear(input, self.lora_a) * self.scale, self.lora_b)
        return super().forward(input.to(self.weight.dtype)) + beside

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + α/R · B · A, `(M, D)`, fp32."""
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


class LoRAEmbedding(nn.Module):
    """A frozen table with a trained one of low rank added to it: W + α/R · B · A, W and its sum `(M, D)`.

    It stands in for an `nn.Embedding`, of which `weight` is read as well; reading it takes a table more of memory.

    Args:
        base: the table to adapt; it stays as it is, and its memory is shared.
        rank, alpha: as for `LoRALinear`.
    """

    def __init__(self, base: nn.Embedding, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.frozen = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.scale = alpha / rank
        self.lora_a, self.lora_b = _fresh(base.weight, rank)

    @property
    def weight(self) -> Tensor:
        """The sum, `(M, D)`."""
        return self.frozen + self.scale * (self.lora_b @ self.lora_a)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows `(…, D)` of ids of any shape."""
        return F.embedding(tokens, self.frozen) + self.scale * (F.embedding(tokens, self.lora_b) @ self.lora_a)


def _fresh(weight_MD: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B, on the device of the weight: A uniform within ±1/√D, as nn.Linear starts, and B zero."""
    outputs, inputs = weight_MD.shape
    a_RD = nn.Parameter(torch.empty(rank, inputs, device=weight_MD.device))
    nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5))
    return a_RD, nn.Parameter(torch.zeros(outputs, rank, device=weight_MD.device))


def add_lora(
    model: Transformer, *, rank: int, alpha: float, targets: Sequence[str], held: torch.dtype = torch.float32
) -> None:
    """Freeze a model and put adapters beside what `targets` names, in place.

    Args:
        model: without adapters.
        rank, alpha, held: see `LoRALinear`.
        targets: some of `TARGETS`.
    """
    model.requires_grad_(False)
    for path in _paths(model, targets):
        base = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        adapted: nn.Module
        if isinstance(base, nn.Linear):
            adapted = LoRALinear(base, rank=rank, alpha=alpha, held=held)
        else:
            assert isinstance(base, nn.Embedding)
            adapted = LoRAEmbedding(base, rank=rank, alpha=alpha)
        setattr(model.get_submodule(parent), name, adapted)


def _paths(model: Transformer, targets: Sequence[str]) -> list[str]:
    """Names in the model of all that is adapted."""
    inner = [path for target, path in _IN_A_BLOCK.items() if target in targets]
    paths = [f"blocks.{layer}.{path}" for layer in range(len(model.blocks)) for path in inner]
    return [*paths, _TABLE] if "tokens" in targets else paths


def adapter_state(model: Transformer) -> dict[str, Tensor]:
    """What is trained of a model with adapters, by the names of its `state_dict`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_shapes(model: Transformer, *, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Shapes of all that `adapter_state` gives once adapters are added to a model; it has none yet."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in _paths(model, targets):
        outputs, inputs = model.get_parameter(f"{path}.weight").shape
        shapes |= {f"{path}.lora_a": (rank, inputs), f"{path}.lora_b": (outputs, rank)}
    return shapes


@torch.no_grad()
def merge(model: Transformer, adapter: Mapping[str, Tensor], alpha: float) -> None:
    """Add an adapter into the weights of the model that it was trained beside, in place.

    Args:
        model: without adapters.
        adapter: matrices as `adapter_state` gives them.
        alpha: α.
    """
    for path in {name.rpartition(".")[0] for name in adapter}:
        weight = model.get_parameter(f"{path}.weight")
        a_RD, b_MR = (adapter[f"{path}.{kind}"].to(weight.device) for kind in ("lora_a", "lora_b"))
        weight.add_(alpha / len(a_RD) * (b_MR @ a_RD))
