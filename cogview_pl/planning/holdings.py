"""What one device holds for the whole of a training run: weights, gradients, optimizer state; the arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PROBE = 256  # edge of the matrices that an optimizer is tried on; optimizers in 8 bits leave smaller ones alone


class Share(NamedTuple):
    """Into how many parts the devices of a strategy divide something; 1: each has all of it."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    gathered_blocks: int = 0
    """Blocks whose divided weights a device puts together at once while it computes."""
    gradient_copies: int = 0
    """Further copies of the gradients, of all of them: what is sent to the other devices."""


def share(strategy: str, devices: int) -> Share:
    """What `strategy=` means for memory; the one place that knows.

    `deepspeed_2` keeps whole gradients only until they are sent. `tp` divides matrices and tables for good.
    """
    if devices == 1:
        return Share()
    known = {
        "ddp": Share(gradient_copies=1),
        "fsdp": Share(devices, devices, devices, gathered_blocks=2),  # one computes, the next is on its way
        "deepspeed_2": Share(1, devices, devices),
        "deepspeed_3": Share(devices, devices, devices, gathered_blocks=2),
        "tp": Share(devices, devices, devices),
    }
    return known.get(strategy, Share())


@dataclass(frozen=True)
class Trained:
    """Numbers of parameters that are trained, by how an optimizer treats them (see `ParameterGroups`)."""

    matrices: int
    tables: int
    vectors: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.tables + self.vectors


def holdings(
    *,
    parameters: int,
    trained: Trained,
    weight_bytes: int,
    gradient_bytes: int,
    state_bytes: StateBytes,
    shared: Share,
    block_bytes: int,
) -> Counter[str]:
    """Bytes of one device by part.

    Args:
        parameters: of the model, frozen ones included.
        trained: those that are trained.
        weight_bytes, gradient_bytes: of one number.
        state_bytes: optimizer state per trained number, by group.
        shared: how the devices divide all this.
        block_bytes: weights of a block, for what is put together.
    """
    state = (
        trained.matrices * state_bytes.matrices
        + trained.tables * state_bytes.tables
        + trained.vectors * state_bytes.vectors
    )
    gradients = trained.total * gradient_bytes
    return Counter(
        weights=parameters * weight_bytes // shared.weights + shared.gathered_blocks * block_bytes,
        gradients=gradients // shared.gradients + gradients * shared.gradient_copies,
        optimizer=int(state / shared.optimizer),
    )


class StateBytes(NamedTuple):
    """Bytes of optimizer state per trained number, by group."""

    matrices: float
    tables: float
    vectors: float


KNOWN_STATES = {
    # A code per moment, and for every 256 of them an fp32 scale; vectors stay in fp32.
    "AdamW8bit": StateBytes(2 + 2 * 4 / 256, 2 + 2 * 4 / 256, 8.0),
    "AdamW4bit": StateBytes(1 + 2 * 4 / 128, 1 + 2 * 4 / 128, 8.0),
    "CPUOffloadOptimizer": StateBytes(0.0, 0.0, 0.0),
}
"""Of torchao's optimizers, whose first step would have to be compiled; by class."""


def state_bytes(build: Callable[[Sequence[dict[str, Any]]], Optimizer], weights: torch.dtype) -> StateBytes:
    """Measured: the optimizer takes one step on small parameters of this dtype.

    Args:
        build: parameter groups → optimizer; groups of linear maps are marked `matrices`.
        weights: dtype of the parameters.
    """
    shapes = ((_PROBE, _PROBE), (_PROBE, _PROBE), (_PROBE,))
    parameters = [nn.Parameter(torch.zeros(shape, dtype=weights)) for shape in shapes]
    groups = [
        {"params": [parameter], "weight_decay": 0.0, "matrices": number == 0}
        for number, parameter in enumerate(parameters)
    ]
    optimizer = build(groups)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    if type(optimizer).__module__.startswith("torchao"):  # would compile its step
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
    else:
        optimizer.step()
    found = [
        sum(_bytes(value) for value in optimizer.state[p].values() if isinstance(value, Tensor) and value.numel() > 1)
        / p.numel()
        for p in parameters
    ]
    return StateBytes(*found)


def step_bytes(*, name: str, fused: bool, on_gpu: bool, trained: int, largest: int, alike: int, size: int) -> int:
    """What an optimizer allocates in its step and gives back.

    Args:
        name: its class.
        fused: by one kernel that needs nothing.
        on_gpu: where AdamW and its like take all parameters at once; on a CPU one after the other.
        trained, largest, alike: numbers of all trained parameters, of the largest, and of the largest set of
            matrices of one shape, which Muon stacks.
        size: bytes of a number.
    """
    if name == "Muon":
        return (3 if on_gpu else 4) * alike * size  # directions, their stack, two iterates
    if fused:
        return 0
    return trained * size if on_gpu and "bit" not in name else 2 * largest * size


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a packed one those that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()
