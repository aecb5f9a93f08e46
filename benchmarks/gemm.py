"""Matrix products alone: the least time that a training step can take on this machine, and its rate.

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
"""Edge of the matrices whose product gives the machine's rate."""
_TRIES = 3


class Linear(NamedTuple):
    """A linear map of a training step."""

    rows: int
    inputs: int
    outputs: int
    maps: int
    """How many maps of this shape the model has."""

    @property
    def flops(self) -> int:
        """Of one direction of all of them; a step has three: forward, to the inputs, to the weights."""
        return 2 * self.rows * self.inputs * self.outputs * self.maps


def linears_of_step(layers: int, hidden_size: int, vocabulary: int, rows: int) -> list[Linear]:
    """All linear maps that `rows` tokens pass; attention is left out."""
    return [
        Linear(rows, hidden_size, 3 * hidden_size, layers),
        Linear(rows, hidden_size, hidden_size, layers),
        Linear(rows, hidden_size, 4 * hidden_size, layers),
        Linear(rows, 4 * hidden_size, hidden_size, layers),
        Linear(rows, hidden_size, vocabulary, 1),
    ]


def training_flops(linears: Sequence[Linear]) -> int:
    """Of all products of a step, forward and backward."""
    return 3 * sum(linear.flops for linear in linears)


def floor(linears: Sequence[Linear], dtype: str) -> Work:
    """All products of a step, each the fastest way that is known for its shape."""
    chosen = [(_fastest(ways), linear.maps) for linear in linears for ways in _directions(linear, DTYPES[dtype])]

    def run() -> None:
        for work, maps in chosen:
            for _ in range(maps):
                work()

    return run


def squares(dtype: str) -> dict[str, Work]:
    """A product of two square matrices, by both ways; `square_rate` turns its seconds into a rate."""
    x, y = (torch.randn(SQUARE, SQUARE, device=DEVICE).to(DTYPES[dtype]) for _ in range(2))
    return {"4,096³ by torch.mm": lambda: torch.mm(x, y), "4,096³ by product": lambda: matmul(x, y)}


def square_rate(milliseconds: dict[str, float]) -> float:
    """FLOP/s of the faster of the two."""
    return 2 * SQUARE**3 / min(value for name, value in milliseconds.items() if name.startswith("4,096³")) * 1e3


def _directions(linear: Linear, dtype: torch.dtype) -> list[list[Work]]:
    """For each direction the ways to take it: `torch.mm` into memory that exists, and our product."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    x_ND, weight_MD = new(linear.rows, linear.inputs), new(linear.outputs, linear.inputs)
    y_NM = new(linear.rows, linear.outputs)
    slope_ND, slope_MD = torch.empty_like(x_ND), torch.empty_like(weight_MD)
    return [
        [lambda: torch.mm(x_ND, weight_MD.T, out=y_NM), lambda: matmul(x_ND, weight_MD)],
        [lambda: torch.mm(y_NM, weight_MD, out=slope_ND), lambda: matmul(y_NM, weight_MD.T)],
        [lambda: torch.mm(y_NM.T, x_ND, out=slope_MD), lambda: matmul(y_NM.T, x_ND.T)],
    ]


def _fastest(ways: Sequence[Work]) -> Work:
    for work in ways:
        work()
    return min(ways, key=lambda work: min(elapsed(work) for _ in range(_TRIES)))
