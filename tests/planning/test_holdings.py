"""Weights, gradients and optimizer state of one device."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cogview_pl.lit.muon import Muon
from cogview_pl.planning.holdings import KNOWN_STATES, StateBytes, Trained, holdings, share, state_bytes

ADAMW = StateBytes(8, 8, 8)
ALL = Trained(800, 150, 50)


def held(strategy: str = "auto", devices: int = 1, trained: Trained = ALL) -> dict[str, int]:
    return holdings(
        parameters=1000,
        trained=trained,
        weight_bytes=4,
        gradient_bytes=4,
        state_bytes=ADAMW,
        shared=share(strategy, devices),
        block_bytes=400,
    )


def test_state_of_optimizers_is_measured() -> None:
    assert state_bytes(partial(torch.optim.AdamW, lr=0.1), torch.float32) == (8, 8, 8)
    assert state_bytes(partial(torch.optim.AdamW, lr=0.1), torch.bfloat16) == (4, 4, 4)
    assert state_bytes(partial(torch.optim.SGD, lr=0.1), torch.float32) == (0, 0, 0)
    muon = partial(Muon, lr=0.1, matrix_lr=0.1, momentum=0.9, betas=(0.9, 0.99), eps=1e-8, fused=False)
    assert state_bytes(muon, torch.float32) == (4, 8, 8)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_states_that_are_known_are_those_of_torchao(name: str) -> None:
    optim = pytest.importorskip("torchao.optim")
    found = state_bytes(partial(getattr(optim, name), lr=0.1), torch.float32)
    assert found == pytest.approx(KNOWN_STATES[name], rel=0.03)


def test_one_device_holds_everything() -> None:
    assert held() == {"weights": 4000, "gradients": 4000, "optimizer": 8000}


def test_frozen_weights_have_neither_gradient_nor_state() -> None:
    assert held(trained=Trained(10, 0, 0)) == {"weights": 4000, "gradients": 40, "optimizer": 80}


def test_devices_divide_what_their_strategy_divides() -> None:
    assert held("ddp", 2) == {"weights": 4000, "gradients": 8000, "optimizer": 8000}  # a copy is sent
    assert held("fsdp", 4) == {"weights": 1000 + 2 * 400, "gradients": 1000, "optimizer": 2000}
    assert held("deepspeed_2", 4) == {"weights": 4000, "gradients": 1000, "optimizer": 2000}
    assert held("tp", 2) == {"weights": 2000, "gradients": 2000, "optimizer": 4000}
    assert held("fsdp", 1) == held()
