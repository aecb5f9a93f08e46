"""Weights and images that, unlike random numbers of a seed, are the same with every version of torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def fixed_values(shape: tuple[int, ...], number: int) -> Tensor:
    """Pseudo-random float32 in 0 … 1; another `number` gives other values."""
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) + 0.61 * number
    return (torch.sin(places * 12.9898) * 43758.5453).remainder(1).reshape(shape).float()


def fixed_weights(model: nn.Module) -> dict[str, Tensor]:
    """A state dict for a model (maybe on the meta device) that keeps the scale of activations."""
    found = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        values = fixed_values(tuple(tensor.shape), number)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith(("running_var", "bn.weight")):
            values = 0.5 + values
        elif tensor.dim() == 1:
            values = 0.4 * (values - 0.5)
        else:
            values = (values - 0.5) * math.sqrt(24 / math.prod(tensor.shape[1:]))
        found[name] = values
    return found
