"""Muon: orthogonalised momentum for linear maps and convolutions, AdamW for everything else.

After Jordan et al. 2024 (kellerjordan.github.io/posts/muon). `torch.optim.Muon` takes only matrices, one by one, and
works in bf16. A CPU without bf16 arithmetic emulates that at a hundredth of its speed.

Shapes: n matrices of one shape, M outputs, D inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # this quintic brings singular values in (0, 1] near 1 in the fewest steps
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7  # as in torch.optim.Muon: a layer without gradients comes to rest, and no norm underflows to 0
_LONG = 2  # ratio of the sides of a matrix from which its Gram matrix is cheaper to iterate


class Muon(Optimizer):
    """Muon for groups marked `matrices`, AdamW for the others.

    A step of Muon is lr · √max(1, M/D) · orthogonal(Nesterov momentum of the gradient), with decoupled weight decay.
    Filters of convolutions count as matrices with one row for each index of their first axis.

    Args:
        params: parameters, or groups of them.
        lr: AdamW's learning rate.
        matrix_lr: Muon's learning rate.
        momentum: momentum of Muon, in [0, 1).
        betas, eps, fused: arguments of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        matrix_lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        marked = [group | {"lr": matrix_lr, "momentum": momentum} for group in groups if group.get("matrices")]
        others = [group for group in groups if not group.get("matrices")]
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([*marked, *self._adamw.param_groups], {"matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both optimizers; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Checkpoints and schedules see one optimizer, so both share one state and one list of groups.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["matrices"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in alike.items():
            momenta_nMD = torch.stack([self._direction(p, group["momentum"]) for p in parameters]).flatten(2)
            directions = orthogonal(momenta_nMD).view(-1, *shape).unbind()
            size = group["lr"] * math.sqrt(max(1.0, momenta_nMD.shape[1] / momenta_nMD.shape[2]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, directions, alpha=-size)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum of the gradient."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def orthogonal(matrices_nMD: Tensor) -> Tensor:
    """Approximates U·Vᵀ of the singular value decomposition U·S·Vᵀ of each matrix `(n, M, D)`, by Newton-Schulz steps.

    The result has singular values from 0.7 to 1.2 and the input's dtype; smaller ones where the norm of a matrix is
    below 1e-7. Arithmetic is fp32 on a CPU, else bf16.
    """
    x = matrices_nMD if matrices_nMD.device.type == "cpu" else matrices_nMD.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the matmuls below are then of the shorter side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    long = x.shape[2] >= _LONG * x.shape[1]
    x = _by_gram_matrices(x) if long and x.dtype == torch.float32 else _by_matrices(x)
    return (x.mT if tall else x).to(matrices_nMD.dtype)


def _by_matrices(x_nMD: Tensor) -> Tensor:
    """Newton-Schulz steps x ← (a + b·g + c·g²)·x with g = x·xᵀ."""
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x_nMD @ x_nMD.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_nMD = torch.baddbmm(x_nMD, polynomial, x_nMD, beta=a)
    return x_nMD


def _by_gram_matrices(x_nMD: Tensor) -> Tensor:
    """The same with two matmuls of the longer side instead of ten: a step's g is p·g·p of the one before.

    In fp32 the squares of singular values keep three digits down to a thousandth of the largest one.
    """
    a, b, c = _COEFFICIENTS
    gram = x_nMD @ x_nMD.mT
    factor = None
    for iteration in range(_ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if iteration + 1 < _ITERATIONS:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    return factor @ x_nMD
