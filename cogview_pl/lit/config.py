"""Options of optimizers and strategies: the schema of `conf/optimizer` and `conf/strategy`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cogview_pl.limits import MISSING, at_least_0, count, share, whole

OF_VALIDATION = ("val/", "eval/", "codebook/usage", "codebook/perplexity")
"""Beginnings of the names of metrics that a validation logs."""


class StrategyKind(Enum):
    """How a run uses its devices."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed_2 = "deepspeed_2"
    deepspeed_3 = "deepspeed_3"
    tp = "tp"

    @property
    def sharded(self) -> bool:
        """Whether each device holds a part of the gradients and optimizer states only."""
        return self not in (StrategyKind.single, StrategyKind.ddp)


class ModelFrom(Enum):
    """Checkpoint of a run that becomes `model/`."""

    last = "last"
    best = "best"


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    optimizer: dict[str, Any] = MISSING
    """`_target_` node: parameter groups → optimizer."""
    weight_decay: float = at_least_0()
    """Of the parameter groups that are decayed."""
    warmup: float = share()
    """Share of the steps in which the learning rate rises linearly from 0."""
    final_lr: float = share()
    """Share of the peak learning rate at which the cosine ends."""
    schedule_steps: int | None = count(None)
    """Step at which the cosine ends; None: `trainer.max_steps`."""
    schedule_start: int = whole(0)
    """Step at which the schedule starts; above 0 it warms up an extended run again."""
    gradient_clip: float = at_least_0()
    """Largest L2 norm of the gradient; 0: no clipping."""


@dataclass
class StrategyConfig:
    """Kind of strategy, and the object or name that Lightning is given for it."""

    kind: StrategyKind = MISSING
    strategy: Any = MISSING


def trainer_arguments() -> list[str]:
    """Names of the arguments of `lightning.Trainer`."""
    from lightning import Trainer  # here, because it imports torch

    return list(inspect.signature(Trainer.__init__).parameters)
