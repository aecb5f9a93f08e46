"""Muon: what a step does to matrices and to everything else, and that its state survives a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cogview_pl.lit.muon import Muon, orthogonal

SETTINGS: dict[str, Any] = {
    "lr": 1e-2,
    "matrix_lr": 2e-2,
    "momentum": 0.95,
    "betas": (0.9, 0.98),
    "eps": 1e-8,
    "fused": True,
}


def parameters() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of two shapes, and a table with a vector."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 16), (48, 16))]
    return matrices, [nn.Parameter(torch.randn(50, 16)), nn.Parameter(torch.randn(16))]


def make(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Muon:
    groups = [
        {"params": matrices, "weight_decay": 0.1, "matrices": True},
        {"params": others, "weight_decay": 0.1, "matrices": False},
    ]
    return Muon(groups, **SETTINGS)


def give_gradients(step: int, *groups: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in (parameter for group in groups for parameter in group):
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 48, 16), (1, 16, 48), (2, 32, 32)])
def test_orthogonal_keeps_directions_and_levels_singular_values(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonal(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(1), (u @ vh).flatten(1)).min() > 0.95
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 48, 16)])
def test_the_momentum_of_a_layer_without_gradients_fades_away(shape: tuple[int, int, int]) -> None:
    """Such as that of a dead ReLU: after a thousand steps the squares of its momentum underflow."""
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    sizes = [float(orthogonal(matrices * 10.0**power).abs().max()) for power in range(-8, -46, -1)]
    assert all(smaller < 1e-6 for smaller in sizes[10:]) and sizes[5:] == sorted(sizes[5:], reverse=True)
    assert torch.allclose(orthogonal(matrices * 1e-6), orthogonal(matrices), atol=1e-5)


def test_a_layer_that_gets_no_gradients_any_more_stays_where_it_is() -> None:
    matrices, others = parameters()
    optimizer = make(matrices, others)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    give_gradients(0, matrices, others)
    for step in range(1500):
        optimizer.step()
        for parameter in matrices:
            parameter.grad = torch.zeros_like(parameter)
        if step == 1000:
            then = [parameter.detach().clone() for parameter in matrices]
    assert all(torch.equal(parameter, before) for parameter, before in zip(matrices, then, strict=True))


@pytest.mark.parametrize("rank", [16, 3])
@pytest.mark.parametrize("shape", [(3, 64, 16), (2, 16, 48)])
def test_long_matrices_give_what_they_give_in_double_precision(shape: tuple[int, int, int], rank: int) -> None:
    """Those in fp32 go through their Gram matrices, which square the singular values."""
    torch.manual_seed(0)
    matrices = torch.randn(shape[0], shape[1], rank) @ torch.randn(shape[0], rank, shape[2])
    matrices += 0.01 * torch.randn(shape)
    assert torch.allclose(orthogonal(matrices), orthogonal(matrices.double()).float(), atol=1e-3)


def steps_beside(reference: Callable[[list[nn.Parameter]], Optimizer], *, matrices: bool) -> float:
    """Largest distance of our matrices, or of everything else, to a reference after three steps."""
    groups = parameters()
    followed = groups[0] if matrices else groups[1]
    copies = [nn.Parameter(p.detach().clone()) for p in followed]
    ours, theirs = make(*groups), reference(copies)
    for step in range(3):
        give_gradients(step, *groups)
        for copy, parameter in zip(copies, followed, strict=True):
            copy.grad = parameter.grad
        ours.step()
        theirs.step()
    return max(float((copy - p).detach().abs().max()) for copy, p in zip(copies, followed, strict=True))


def test_matrices_move_as_torchs_own_muon_moves_them() -> None:
    reference = partial(torch.optim.Muon, lr=2e-2, weight_decay=0.1, momentum=0.95)
    assert steps_beside(reference, matrices=True) < 2e-3  # of steps of 0.06 in all; the reference computes in bf16


def test_everything_else_moves_as_adamw_moves_it() -> None:
    reference = partial(torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, fused=True)
    assert steps_beside(reference, matrices=False) == 0


def test_a_restored_optimizer_goes_on_as_if_never_stopped() -> None:
    def run(restore_at: int | None) -> list[Tensor]:
        matrices, others = parameters()
        optimizer = make(matrices, others)
        for step in range(4):
            if step == restore_at:
                saved = optimizer.state_dict()
                optimizer = make(matrices, others)
                optimizer.load_state_dict(saved)
            give_gradients(step, matrices, others)
            optimizer.step()
        return [parameter.detach() for parameter in (*matrices, *others)]

    for undisturbed, restored in zip(run(None), run(2), strict=True):
        assert torch.equal(undisturbed, restored)
