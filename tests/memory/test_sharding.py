"""How the devices of a strategy divide weights, gradients and optimizer state."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cogview_pl.memory.model import Counted, Model, Tensors, counted
from cogview_pl.memory.sharding import Holdings, holdings
from cogview_pl.transformer.config import LoRATarget
from tests.make_models import transformer_settings

WHOLE = Counted(1000, 4000, 1000, 3, (Tensors((1000,), torch.float32, True, 1),))
"""Three blocks of 1,000 bytes each, and tables of as much."""
ADAMW = 8000


def held(strategy: str, devices: int, arithmetic: torch.dtype = torch.float32) -> Holdings:
    return holdings(WHOLE, ADAMW, strategy, devices, arithmetic)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "tp"])
def test_one_device_holds_everything(strategy: str) -> None:
    assert held(strategy, 1) == Holdings(Counter(weights=4000, gradients=4000, optimizer=8000))


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_data_parallel_devices_send_a_copy_of_the_gradients(strategy: str) -> None:
    assert held(strategy, 2).always == {"weights": 4000, "gradients": 4000, "optimizer": 8000, "gradient_buckets": 4000}
    assert "gradients" not in held(strategy, 2).without_gradients


def test_sharded_weights_are_whole_while_they_compute() -> None:
    found = held("fsdp", 4)
    assert found.always == {"weights": 1000, "gradients": 1000, "optimizer": 2000}
    assert found.computing == {"gathered_weights": 2 * 1000 + 1000}  # two blocks, and the tables
    assert found.gradients(Counter(gradients=4000, logits=7)) == {"gradients": 1000 + 2000, "logits": 7}


def test_deepspeed_computes_in_half_and_keeps_fp32_with_the_state() -> None:
    two, three = held("deepspeed_2", 4, torch.bfloat16), held("deepspeed_3", 4, torch.bfloat16)
    assert two.always == {"weights": 2000, "gradients": 500, "optimizer": (8000 + 4000) // 4}
    assert three.always == {**two.always, "weights": 500}
    assert three.computing["gathered_weights"] == 2 * 500


def test_tensor_parallel_devices_have_whole_tables_and_a_part_of_each_matrix() -> None:
    settings = transformer_settings(vocab_size=100, num_layers=3, hidden_size=32, num_heads=4, num_positions=20)
    whole, part = (counted(Model.of(settings, torch.float32, parts=parts)) for parts in (1, 2))
    matrices, biases = 3 * 12 * 32**2, 3 * (3 * 32 + 4 * 32)  # of `qkv` and `up`; those behind a sum are whole
    assert whole.parameters - part.parameters == (matrices + biases) // 2


def test_frozen_weights_have_no_gradient() -> None:
    settings = transformer_settings(vocab_size=100, num_layers=3, hidden_size=32, num_heads=4, num_positions=20)
    lora = {"rank": 2, "alpha": 2, "targets": [LoRATarget.up], "held": torch.bfloat16}
    plain, adapted = (counted(Model.of(settings, torch.float32, more)) for more in (None, lora))
    assert adapted.trained_parameters == adapted.gradient_bytes // 4 == 3 * 2 * (32 + 4 * 32)
    frozen_in_half = 3 * (4 * 32**2 + 4 * 32)
    assert adapted.bytes == plain.bytes - 2 * frozen_in_half + adapted.gradient_bytes
