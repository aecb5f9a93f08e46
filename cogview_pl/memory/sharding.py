"""How a strategy divides weights, gradients and optimizer state among devices. Nothing else in the room knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from cogview_pl.assembly.strategy import DEEPSPEED
from cogview_pl.kernels.cpu_linear import Linear
from cogview_pl.lit.config import StrategyKind
from cogview_pl.memory.phases import BACKWARD, FORWARD, FP32, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP, WEIGHTS, Phases
from cogview_pl.transformer.block import Block
from cogview_pl.transformer.model import Transformer

_BUCKET = 200_000_000  # numbers in a gradient bucket of DeepSpeed, which keeps two of them


def shard(
    phases: Phases,
    kind: StrategyKind,
    devices: int,
    *,
    arithmetic: torch.dtype = torch.float32,
    arguments: Mapping[str, Any] | None = None,
    layers: int = 0,
    block: int = 0,
) -> Phases:
    """Bytes of one device, by phase and part.

    Args:
        phases: bytes of a training step whose weights, gradients and optimizer state are all on one device (with
            tensor parallelism, the part of that device).
        kind, devices: the strategy, and the number of its devices.
        arithmetic: dtype of the forward pass, in which DeepSpeed keeps weights and gradients.
        arguments: of the strategy; DeepSpeed has `offload_optimizer` and `offload_parameters`.
        layers, block: number of transformer blocks, and bytes of the weights of one.
    """
    gradients, tables = phases[FORWARD][GRADIENTS], phases[FORWARD][WEIGHTS] - layers * block
    size, gathers = arithmetic.itemsize, kind == StrategyKind.deepspeed_3

    def fsdp(parts: Counter[str], unsharded: int) -> Counter[str]:
        """Weights of two blocks (one computes, the next is on its way) and the tables are gathered.

        `unsharded` bytes of gradients are full in the backward pass, before they are sharded.
        """
        divided = {part: parts[part] // devices for part in (WEIGHTS, GRADIENTS, OPTIMIZER, OPTIMIZER_STEP)}
        divided[GRADIENTS] += min(parts[GRADIENTS], unsharded)
        return Counter({**parts, **divided, "gathered_weights": 2 * block + tables})

    def deepspeed(parts: Counter[str]) -> Counter[str]:
        """Weights and gradients are in the dtype of arithmetic; the optimizer keeps fp32 weights besides its state."""
        weights, state = parts[WEIGHTS] * size // FP32, (parts[OPTIMIZER] + gradients) // devices
        offloads = arguments or {}
        divided = {
            WEIGHTS: 0 if offloads.get("offload_parameters") else weights // (devices if gathers else 1),
            GRADIENTS: parts[GRADIENTS] * size // FP32 // devices,
            OPTIMIZER: 0 if offloads.get("offload_optimizer") else state,
            OPTIMIZER_STEP: parts[OPTIMIZER_STEP] // devices,
            "gathered_weights": 2 * block * size // FP32 if gathers else 0,
            "gradient_buckets": 2 * min(_BUCKET, gradients // FP32) * size,
        }
        return Counter({**parts, **divided})

    if kind in DEEPSPEED:
        return {name: deepspeed(parts) for name, parts in phases.items()}
    if kind == StrategyKind.fsdp and devices > 1:
        return {name: fsdp(parts, block + tables if name == BACKWARD else 0) for name, parts in phases.items()}
    if not kind.sharded and devices > 1:  # gradients are sent in buckets of their size
        return {name: parts + Counter(gradient_buckets=gradients) for name, parts in phases.items()}
    return phases


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
