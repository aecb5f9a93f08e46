"""How the devices of a strategy divide weights, gradients and optimizer state."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cogview_pl.lit.config import StrategyKind
from cogview_pl.memory.phases import BACKWARD, FORWARD, WEIGHTS
from cogview_pl.memory.sharding import narrow, shard
from cogview_pl.memory.training import BatchSize, Predicted, StepOptions, sequence_step
from cogview_pl.transformer.config import LoRAConfig, LoRATarget
from cogview_pl.transformer.lora import add_lora
from cogview_pl.transformer.model import Transformer
from tests.make_models import make_transformer

PARTS = Counter(weights=4000, gradients=4000, optimizer=8000)
PHASES = {FORWARD: PARTS, BACKWARD: Counter(weights=4000, gradients=4000, optimizer=8000, logits=7)}
"""A model of three blocks of 1,000 bytes each and 1,000 bytes of tables, with AdamW."""

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_heads": 4, "num_positions": 20}


def sharded(strategy: str, devices: int, arithmetic: torch.dtype = torch.float32) -> dict[str, Counter[str]]:
    return shard(PHASES, StrategyKind(strategy), devices, arithmetic=arithmetic, layers=3, block=1000)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "tp"])
def test_one_device_holds_everything(strategy: str) -> None:
    assert sharded(strategy, 1) == PHASES


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_data_parallel_devices_send_a_copy_of_the_gradients(strategy: str) -> None:
    assert sharded(strategy, 2)[FORWARD] == {**PARTS, "gradient_buckets": 4000}


def test_sharded_weights_are_full_while_they_compute() -> None:
    found = sharded("fsdp", 4)
    gathered = 2 * 1000 + 1000  # two blocks, and the tables
    assert found[FORWARD] == Counter(weights=1000, gradients=1000, optimizer=2000, gathered_weights=gathered)
    assert found[BACKWARD]["gradients"] == 1000 + 2000
    assert found[BACKWARD]["logits"] == 7


def test_deepspeed_computes_in_half_and_keeps_fp32_with_the_state() -> None:
    two, three = sharded("deepspeed_2", 4, torch.bfloat16)[FORWARD], sharded("deepspeed_3", 4, torch.bfloat16)[FORWARD]
    assert (two["weights"], two["gradients"], two["optimizer"]) == (2000, 500, (8000 + 4000) // 4)
    assert (three["weights"], three["gradients"], three["optimizer"]) == (500, 500, (8000 + 4000) // 4)
    assert two["gathered_weights"] == 0
    assert three["gathered_weights"] == 2 * 500
    assert two["gradient_buckets"] == 2 * 1000 * 2


def test_deepspeed_can_keep_state_and_weights_on_the_host() -> None:
    options = {"offload_optimizer": True, "offload_parameters": True}
    found = shard(PHASES, StrategyKind.deepspeed_3, 4, arithmetic=torch.bfloat16, arguments=options)[FORWARD]
    assert found["optimizer"] == found["weights"] == 0


def test_tensor_parallel_devices_have_full_tables_and_a_part_of_each_matrix() -> None:
    full, part = make_transformer(**SIZES, num_layers=3), make_transformer(**SIZES, num_layers=3)
    narrow(part, 2)
    matrices, biases = 3 * 12 * 32**2, 3 * (3 * 32 + 4 * 32)  # of `qkv` and `up`; those after a sum are full
    assert parameters(full) - parameters(part) == (matrices + biases) // 2
    assert part.blocks[0].attention.num_heads == 2


def test_frozen_weights_have_no_gradient() -> None:
    lora = LoRAConfig(rank=2, alpha=2, targets=[LoRATarget.up], merge=True)

    def adapted(layers: int) -> Transformer:
        model = make_transformer(**SIZES, num_layers=layers)
        add_lora(model, lora, held=torch.bfloat16)
        return model

    batch, options = BatchSize(1, 8, (Predicted(8, range(100)),)), StepOptions(optimizer=None)
    plain, some = (
        sequence_step(build, 3, batch, options)[FORWARD]
        for build in (lambda layers: make_transformer(**SIZES, num_layers=layers), adapted)
    )
    trained = 3 * 2 * (32 + 4 * 32)
    assert some["gradients"] == 4 * trained
    frozen_in_half = 3 * (4 * 32**2 + 4 * 32)
    assert some[WEIGHTS] == plain[WEIGHTS] - 2 * frozen_in_half + some["gradients"]


def parameters(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
