"""Matrix products alone: a lower bound for the time of a training step on this machine, and the machine's rate.

Shapes: N rows, D inputs, M outputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Work, elapsed
from benchmarks.settings import DEVICE, DTYPES
from cogview_pl.kernels.cpu_linear import matmul

SQUARE = 4096
"""Edge of the square matrices that measure the machine's rate."""
_TRIES = 3


class Linear(NamedTuple):
    """A linear map of a training step."""

    rows: int
    inputs: int
    outputs: int
    maps: int
    """Number of maps of this shape in the model."""

    @property
    def flops(self) -> int:
        """FLOP of all maps in one direction; a step has three: forward, gradients of inputs, gradients of weights."""
        return 2 * self.rows * self.inputs * self.outputs * self.maps


def linears_of_step(layers: int, hidden_size: int, vocabulary: int, rows: int) -> list[Linear]:
    """All linear maps of `rows` tokens; attention is left out."""
    return [
        Linear(rows, hidden_size, 3 * hidden_size, layers),
        Linear(rows, hidden_size, hidden_size, layers),
        Linear(rows, hidden_size, 4 * hidden_size, layers),
        Linear(rows, 4 * hidden_size, hidden_size, layers),
        Linear(rows, hidden_size, vocabulary, 1),
    ]


def training_flops(linears: Sequence[Linear]) -> int:
    """FLOP of all matrix products of a step, forward and backward."""
    return 3 * sum(linear.flops for linear in linears)


def floor(linears: Sequence[Linear], dtype: str) -> Work:
    """All matrix products of a step, each by the fastest known function for its shape."""
    chosen = [(_fastest(ways), linear.maps) for linear in linears for ways in _directions(linear, DTYPES[dtype])]

    def run() -> None:
        for work, maps in chosen:
            for _ in range(maps):
                work()

    return run


def squares(dtype: str) -> dict[str, Work]:
    """Product of two square matrices by both functions; `square_rate` turns its time into a rate."""
    x, y = (torch.randn(SQUARE, SQUARE, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    return {"4,096³ by torch.mm": lambda: torch.mm(x, y), "4,096³ by product": lambda: matmul(x, y)}


def square_rate(milliseconds: dict[str, float]) -> float:
    """FLOP/s of the faster function."""
    return 2 * SQUARE**3 / min(value for name, value in milliseconds.items() if name.startswith("4,096³")) * 1e3


def _directions(linear: Linear, dtype: torch.dtype) -> list[list[Work]]:
    """Two functions for each direction: `torch.mm` into allocated memory, and the project's `matmul`."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    x_ND, weight_MD = new(linear.rows, linear.inputs), new(linear.outputs, linear.inputs)
    y_NM = new(linear.rows, linear.outputs)
    gradient_ND, gradient_MD = torch.empty_like(x_ND), torch.empty_like(weight_MD)
    return [
        [lambda: torch.mm(x_ND, weight_MD.T, out=y_NM), lambda: matmul(x_ND, weight_MD)],
        [lambda: torch.mm(y_NM, weight_MD, out=gradient_ND), lambda: matmul(y_NM, weight_MD.T)],
        [lambda: torch.mm(y_NM.T, x_ND, out=gradient_MD), lambda: matmul(y_NM.T, x_ND.T)],
    ]


def _fastest(ways: Sequence[Work]) -> Work:
    for work in ways:
        work()
    return min(ways, key=lambda work: min(elapsed(work) for _ in range(_TRIES)))
