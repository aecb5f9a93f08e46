"""What an optimizer holds, and what it allocates in a step: it takes one, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from cogview_pl.memory.model import Tensors
from cogview_pl.memory.trace import LiveBytes, plain_tensors

Build = Callable[[Sequence[dict[str, Any]]], Optimizer]
"""Parameter groups → optimizer; groups of linear maps are marked `matrices`."""

_FIRST = 4096  # elements of a tensor on which optimizers in 8 bits use their tables


class OptimizerBytes(NamedTuple):
    """Of a whole model."""

    state: int
    step: int
    """Allocated in a step and given back."""


def optimizer_bytes(build: Build, trained: Sequence[Tensors], *, on_gpu: bool) -> OptimizerBytes:
    """State and work space of an optimizer, found on one tensor of every kind.

    On a CPU optimizers take one parameter after the other; on a GPU those of torch take all at once, unless they are
    fused, and those of torchao are compiled. Muon stacks matrices of one shape everywhere, so it is given them all.

    Args:
        build: makes it.
        trained: what it trains.
        on_gpu: whether it works on a GPU.
    """
    name, module = _tried(build)
    number = [kind.number if name == "Muon" and kind.matrices else 1 for kind in trained]
    with FakeTensorMode():
        kinds = [kind for kind, copies in zip(trained, number, strict=True) for _ in range(copies)]
        parameters = [_with_gradient(torch.zeros(kind.shape, dtype=kind.dtype)) for kind in kinds]
        with LiveBytes() as live:
            optimizer = build([_group(p, kind.matrices) for p, kind in zip(parameters, kinds, strict=True)])
            optimizer.step()  # makes the state
            of_kind = {kind: _state(optimizer, p) for p, kind in zip(parameters, kinds, strict=True)}
            live.restart()
            before = live.total
            optimizer.step()
            step = live.highest - before
    state = sum(kind.number * of_kind[kind] for kind in trained)
    if on_gpu and step and name != "Muon":
        all_at_once = module.startswith("torch.")
        sizes = [kind.size * (kind.number if all_at_once else 1) for kind in trained]
        step = sum(sizes) if all_at_once else max(sizes)
    return OptimizerBytes(state, step)


def _tried(build: Build) -> tuple[str, str]:
    """Name and module of an optimizer that has taken a real step.

    What it makes once in a process, and needs values for, is there from then on.
    """
    optimizer = build([_group(_with_gradient(torch.zeros(_FIRST)), False)])
    optimizer.step()
    return type(optimizer).__name__, type(optimizer).__module__


def _group(parameter: nn.Parameter, matrices: bool) -> dict[str, Any]:
    return {"params": [parameter], "weight_decay": 0.0, "matrices": matrices}


def _with_gradient(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return sum(plain.numel() * plain.element_size() for tensor in tensors for plain in plain_tensors(tensor))
