"""How a strategy divides weights, gradients and optimizer state among devices. Nothing else in the room knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.lit.config import StrategyKind
from cogview_pl.memory.phases import BACKWARD, FORWARD, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP, WEIGHTS
from cogview_pl.transformer.block import Block
from cogview_pl.transformer.model import Transformer

_BUCKET = 200_000_000  # numbers in a gradient bucket of DeepSpeed, which keeps two of them
_FP32 = torch.float32.itemsize


@dataclass(frozen=True)
class Sharding:
    """The strategy of a training run.

    Attributes:
        kind: one of `conf/strategy/`.
        devices: their number.
        arithmetic: dtype of the forward pass, in which DeepSpeed keeps weights and gradients.
        options: arguments of the strategy; DeepSpeed has `offload_optimizer` and `offload_parameters`.
    """

    kind: StrategyKind
    devices: int
    arithmetic: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)


def shard(
    phases: Mapping[str, Counter[str]], sharding: Sharding, *, layers: int = 0, block: int = 0
) -> dict[str, Counter[str]]:
    """Bytes of one device, by phase and part.

    Args:
        phases: bytes of a training step whose weights, gradients and optimizer state are all on one device (with
            tensor parallelism, the part of that device).
        sharding: the strategy.
        layers, block: number of transformer blocks, and bytes of the weights of one.
    """
    kind, devices = sharding.kind, sharding.devices
    gradients, tables = phases[FORWARD][GRADIENTS], phases[FORWARD][WEIGHTS] - layers * block
    if kind in (StrategyKind.deepspeed_2, StrategyKind.deepspeed_3):
        return {name: _deepspeed(parts, sharding, gradients, block) for name, parts in phases.items()}
    if kind == StrategyKind.fsdp and devices > 1:
        return {
            name: _fsdp(parts, devices, 2 * block + tables, block + tables if name == BACKWARD else 0)
            for name, parts in phases.items()
        }
    if kind in (StrategyKind.single, StrategyKind.ddp) and devices > 1:  # gradients are sent in buckets of their size
        return {name: parts + Counter(gradient_buckets=gradients) for name, parts in phases.items()}
    return dict(phases)


def _fsdp(parts: Counter[str], devices: int, gathered: int, unsharded: int) -> Counter[str]:
    """Weights of two blocks (one computes, the next is on its way) and the tables are gathered while a step computes.

    `unsharded` bytes of gradients are full in the backward pass, before they are sharded.
    """
    divided = {part: parts[part] // devices for part in (WEIGHTS, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP)}
    divided[GRADIENTS] += min(parts[GRADIENTS], unsharded)
    return Counter({**parts, **divided, "gathered_weights": gathered})


def _deepspeed(parts: Counter[str], sharding: Sharding, gradients: int, block: int) -> Counter[str]:
    """Weights and gradients are in the dtype of arithmetic; the optimizer keeps fp32 weights besides its state."""
    size, sharded = sharding.arithmetic.itemsize, sharding.kind == StrategyKind.deepspeed_3
    weights = parts[WEIGHTS] * size // _FP32 // (sharding.devices if sharded else 1)
    state = (parts[OPTIMIZER] + gradients) // sharding.devices
    divided = {
        WEIGHTS: 0 if sharding.options.get("offload_parameters") else weights,
        GRADIENTS: parts[GRADIENTS] * size // _FP32 // sharding.devices,
        OPTIMIZER: 0 if sharding.options.get("offload_optimizer") else state,
        OPTIMIZER_STEP: parts[OPTIMIZER_STEP] // sharding.devices,
        "gathered_weights": 2 * block * size // _FP32 if sharded else 0,
        "gradient_buckets": 2 * min(_BUCKET, gradients // _FP32) * size,
    }
    return Counter({**parts, **divided})


def narrow(model: Transformer, parts: int) -> None:
    """Leave in each block what tensor parallelism among `parts` devices leaves one of them, in place."""
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        hidden_size = model.token_embedding.embedding_dim
        attention.qkv = Linear(hidden_size, 3 * hidden_size // parts)
        attention.out = Linear(hidden_size // parts, hidden_size)
        mlp.up = Linear(hidden_size, 4 * hidden_size // parts)
        mlp.down = Linear(4 * hidden_size // parts, hidden_size)
        attention.num_heads = max(1, model.num_heads // parts)
