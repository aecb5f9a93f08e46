"""How the devices of a strategy divide weights, gradients and optimizer state; the one place that knows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from cogview_pl.memory.model import Counted
from cogview_pl.memory.sequence_step import GRADIENTS

_BUCKET = 200_000_000  # numbers in each of DeepSpeed's, of which two are under way


@dataclass(frozen=True)
class Holdings:
    """Bytes of one device.

    Attributes:
        always: weights, gradients and optimizer state, as they are between two steps.
        computing: what it has on top while it computes a step.
        divided: devices that the gradients are spread over.
        undivided: bytes of gradients that are whole at once before they are spread.
    """

    always: Counter[str]
    computing: Counter[str] = field(default_factory=Counter)
    divided: int = 1
    undivided: int = 0

    @property
    def without_gradients(self) -> Counter[str]:
        """`always` before the first gradient comes."""
        return Counter({part: size for part, size in self.always.items() if part != GRADIENTS})

    def gradients(self, whole: Counter[str]) -> Counter[str]:
        """Bytes of a step in which gradients count as the device has them, from bytes in which they are whole."""
        if self.divided == 1:
            return whole
        parts = whole[GRADIENTS] // self.divided + min(whole[GRADIENTS], self.undivided)
        return whole + Counter({GRADIENTS: parts - whole[GRADIENTS]})


def holdings(model: Counted, state: int, strategy: str, devices: int, arithmetic: torch.dtype) -> Holdings:
    """What `strategy=` means for memory.

    Args:
        model: as one device computes it: with tensor parallelism its part.
        state: bytes of optimizer state of the model.
        strategy: one of `conf/strategy/`.
        devices: how many there are.
        arithmetic: dtype of autocast, in which DeepSpeed keeps the weights.
    """
    weights, gradients = model.bytes, model.gradient_bytes
    always = Counter({"weights": weights, GRADIENTS: gradients, "optimizer": state})
    if devices == 1 and not strategy.startswith("deepspeed"):
        return Holdings(always)
    if strategy in ("single", "ddp"):  # buckets that are sent, made when training starts
        return Holdings(always + Counter(gradient_buckets=gradients))
    if strategy == "tp":
        return Holdings(always)
    tables = weights - model.block_bytes * model.blocks  # whole from the first block's forward pass on
    if strategy == "fsdp":
        gathered = Counter(gathered_weights=2 * model.block_bytes + tables)  # one computes, the next is on its way
        divided = Counter({part: size // devices for part, size in always.items()})
        return Holdings(divided, gathered, devices, model.block_bytes + tables)
    return _deepspeed(model, state, strategy, devices, arithmetic)


def _deepspeed(model: Counted, state: int, strategy: str, devices: int, arithmetic: torch.dtype) -> Holdings:
    """Weights and gradients in the dtype of arithmetic; the optimizer keeps its part of the weights in fp32 as well."""
    weights = model.parameters * arithmetic.itemsize
    gradients = model.trained_parameters * arithmetic.itemsize
    master = model.trained_parameters * torch.float32.itemsize
    buckets = 2 * min(_BUCKET, model.trained_parameters) * arithmetic.itemsize
    always = {
        "weights": weights // (devices if strategy == "deepspeed_3" else 1),
        GRADIENTS: gradients // devices,
        "optimizer": (state + master) // devices,
    }
    block = model.block_bytes * arithmetic.itemsize // torch.float32.itemsize
    gathered = 2 * block if strategy == "deepspeed_3" else 0
    computing = Counter(gathered_weights=gathered, gradient_buckets=buckets)
    return Holdings(Counter(always), computing, devices)
