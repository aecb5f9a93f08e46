"""LoRA: trained low-rank matrices added to frozen weights (Hu et al. 2021, arxiv.org/abs/2106.09685).

Shapes: D inputs, M outputs, R rank; for the token embedding D is the hidden size and M the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.kernels.cpu_linear import Linear, linear
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.model import Transformer

_IN_A_BLOCK = {
    LoRATarget.qkv: "attention.qkv",
    LoRATarget.out: "attention.out",
    LoRATarget.up: "mlp.up",
    LoRATarget.down: "mlp.down",
}


class LoRALinear(Linear):
    """x · (W + α/R · B · A)ᵀ + bias; A `(R, D)` and B `(M, R)` are trained, W and bias are frozen.

    B starts at zero, so a new adapter changes nothing. A and B are fp32. Weight and bias keep their names.

    Args:
        base: the map to adapt; unchanged. Its memory is shared if `held` is its precision.
        rank: R.
        alpha: α.
        held: precision of W and bias. Half precision suits autocast to the same precision, which rounds W for every
            matmul anyway and keeps the rounded copy for the backward pass.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, held: torch.dtype = torch.float32) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = (
            nn.Parameter(parameter.detach().to(held), requires_grad=False) for parameter in (base.weight, base.bias)
        )
        self.scale = alpha / rank
        self.lora_a, self.lora_b = _new_matrices(base.weight, rank)

    def forward(self, input: Tensor) -> Tensor:
        """Map a tensor of any shape (…, D) to (…, M)."""
        update = linear(linear(input, self.lora_a) * self.scale, self.lora_b)
        return super().forward(input.to(self.weight.dtype)) + update

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + α/R · B · A, `(M, D)`, fp32."""
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


class LoRAEmbedding(nn.Module):
    """A frozen embedding with a trained low-rank update: W + α/R · B · A, `(M, D)`.

    It replaces an `nn.Embedding` whose `weight` is the lm_head too; each read of `weight` allocates the sum.

    Args:
        base: the embedding to adapt; unchanged, and its memory is shared.
        rank, alpha: as for `LoRALinear`.
    """

    def __init__(self, base: nn.Embedding, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.frozen = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.scale = alpha / rank
        self.lora_a, self.lora_b = _new_matrices(base.weight, rank)

    @property
    def weight(self) -> Tensor:
        """The sum, `(M, D)`."""
        return self.frozen + self.scale * (self.lora_b @ self.lora_a)

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows `(…, D)` of ids of any shape."""
        return F.embedding(tokens, self.frozen) + self.scale * (F.embedding(tokens, self.lora_b) @ self.lora_a)


def _new_matrices(weight_MD: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B on the device of the weight: A uniform within ±1/√D, like a new nn.Linear, and B zero."""
    outputs, inputs = weight_MD.shape
    a_RD = nn.Parameter(torch.empty(rank, inputs, device=weight_MD.device))
    nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5))
    return a_RD, nn.Parameter(torch.zeros(outputs, rank, device=weight_MD.device))


def add_lora(model: Transformer, config: LoRAConfig, held: torch.dtype = torch.float32) -> None:
    """Freeze a model without adapters and add adapters to its targets, in place; `held` as for `LoRALinear`."""
    model.requires_grad_(False)
    for path in _paths(model, config):
        base = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        adapted: nn.Module
        if isinstance(base, nn.Linear):
            adapted = LoRALinear(base, rank=config.rank, alpha=config.alpha, held=held)
        else:
            assert isinstance(base, nn.Embedding)
            adapted = LoRAEmbedding(base, rank=config.rank, alpha=config.alpha)
        setattr(model.get_submodule(parent), name, adapted)


def _paths(model: Transformer, config: LoRAConfig) -> list[str]:
    """Names of the adapted modules."""
    inner = [path for target, path in _IN_A_BLOCK.items() if target in config.targets]
    paths = [f"blocks.{layer}.{path}" for layer in range(len(model.blocks)) for path in inner]
    return [*paths, "token_embedding"] if LoRATarget.tokens in config.targets else paths


def adapter_state(model: Transformer) -> dict[str, Tensor]:
    """Trained matrices of a model with adapters, by their names in its `state_dict`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_shapes(model: Transformer, config: LoRAConfig) -> dict[str, tuple[int, int]]:
    """Shapes that `adapter_state` will have after `add_lora`; the model has no adapters yet."""
    shapes: dict[str, tuple[int, int]] = {}
    for path in _paths(model, config):
        outputs, inputs = model.get_parameter(f"{path}.weight").shape
        shapes |= {f"{path}.lora_a": (config.rank, inputs), f"{path}.lora_b": (outputs, config.rank)}
    return shapes


@torch.no_grad()
def merge(model: Transformer, adapter: Mapping[str, Tensor], alpha: float) -> None:
    """Add the matrices of an adapter to the weights of its base model, in place.

    Args:
        model: the base model, without adapters.
        adapter: matrices, as `adapter_state` gives them.
        alpha: α.
    """
    for path in {name.rpartition(".")[0] for name in adapter}:
        weight = model.get_parameter(f"{path}.weight")
        a_RD, b_MR = (adapter[f"{path}.{kind}"].to(weight.device) for kind in ("lora_a", "lora_b"))
        weight.add_(alpha / len(a_RD) * (b_MR @ a_RD))
