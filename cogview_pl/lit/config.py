"""Options of optimizers and strategies: the schema of `conf/optimizer` and `conf/strategy`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cogview_pl.limits import MISSING, at_least_0, share


class StrategyKind(Enum):
    """How a run uses its devices."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    deepspeed_2 = "deepspeed_2"
    deepspeed_3 = "deepspeed_3"
    tp = "tp"

    @property
    def spreads(self) -> bool:
        """Whether no device has all gradients and optimizer states."""
        return self not in (StrategyKind.single, StrategyKind.ddp)


def trainer_arguments() -> list[str]:
    """Names of the arguments of `lightning.Trainer`."""
    from lightning import Trainer  # imports torch

    return list(inspect.signature(Trainer.__init__).parameters)


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    optimizer: dict[str, Any] = MISSING
    weight_decay: float = at_least_0()
    warmup: float = share()
    final_lr: float = share()
    gradient_clip: float = at_least_0()


@dataclass
class StrategyConfig:
    """Devices: which kind of strategy, and the object or name that Lightning is given."""

    kind: StrategyKind = MISSING
    strategy: Any = MISSING
