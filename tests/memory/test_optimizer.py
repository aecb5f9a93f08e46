"""State and work space of optimizers, found without memory, against a real step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from cogview_pl.lit.low_memory import adamw_8bit, adamw_bf16
from cogview_pl.lit.muon import Muon
from cogview_pl.memory.model import Tensors
from cogview_pl.memory.optimizer import optimizer_bytes
from cogview_pl.memory.trace import LiveBytes

KINDS = (((256, 64), True, 3), ((300, 64), False, 1), ((17, 9), False, 2), ((64,), False, 4))
TORCHAO = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
OPTIMIZERS = {
    "adamw": (partial(torch.optim.AdamW, lr=0.1), torch.float32),
    "fused": (partial(torch.optim.AdamW, lr=0.1, fused=True), torch.float32),
    "muon": (partial(Muon, matrix_lr=0.1, momentum=0.9, fused=False, **TORCHAO), torch.float32),
    "8bit": (partial(adamw_8bit, **TORCHAO), torch.float32),
    "8bit_bf16": (partial(adamw_8bit, **TORCHAO), torch.bfloat16),
    "bf16": (partial(adamw_bf16, **TORCHAO), torch.bfloat16),
}


def real(build: Any, trained: list[Tensors]) -> tuple[int, int]:
    """Bytes of the state, and those at the height of a step on top."""
    parameters = [(kind, nn.Parameter(torch.zeros(kind.shape, dtype=kind.dtype))) for kind in trained]
    groups = [{"params": [p], "weight_decay": 0.0, "matrices": kind.matrices} for kind, p in parameters]
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        optimizer = build(groups)
        optimizer.step()
        state = live.total
        live.restart()
        optimizer.step()
    return state, live.highest - state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bytes_are_those_of_a_real_step(name: str) -> None:
    if "bit" in name or name == "bf16":
        pytest.importorskip("torchao")
    build, dtype = OPTIMIZERS[name]
    kinds = [Tensors(shape, dtype, matrices, number) for shape, matrices, number in KINDS]
    state, step = real(build, [kind._replace(number=1) for kind in kinds for _ in range(kind.number)])
    found = optimizer_bytes(build, kinds, on_gpu=False)
    assert found.state == pytest.approx(state, abs=10_000)  # tables of 8-bit numbers come past the operators
    assert found.step == pytest.approx(step, rel=0.15, abs=4096)


def test_on_a_gpu_all_are_taken_at_once_unless_fused() -> None:
    kinds = [Tensors(shape, torch.float32, matrices, number) for shape, matrices, number in KINDS]
    plain, fused = (optimizer_bytes(OPTIMIZERS[name][0], kinds, on_gpu=True) for name in ("adamw", "fused"))
    assert plain.step == sum(kind.size * kind.number for kind in kinds)
    assert fused.step == 0
