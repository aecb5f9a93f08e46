"""Optimizer, learning-rate schedule and gradient norm of both stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.transformer.parallel import gradient_norm

BuildOptimizer = Callable[[Iterable[Any]], Optimizer]
"""Parameter groups → optimizer; learning rate and other arguments are bound already."""


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike."""

    name: str
    """Suffix of the learning rate in the logs: `lr-Muon/matrices`."""
    parameters: list[nn.Parameter]
    matrices: bool
    """Whether they are linear maps or filters inside the model; Muon is for these."""
    decay: bool


def configure_optimizers(
    build: BuildOptimizer, options: OptimizerConfig, groups: Iterable[ParameterGroup], max_steps: int
) -> dict[str, Any]:
    """Lightning's optimizer dictionary, with warm-up and cosine per step."""
    optimizer = build(
        [
            {
                "name": group.name,
                "params": group.parameters,
                "weight_decay": options.weight_decay if group.decay else 0.0,
                "matrices": group.matrices,
            }
            for group in groups
        ]
    )
    schedule = LambdaLR(optimizer, warmup_cosine(max_steps, options.warmup, options.final_lr))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(max_steps: int, warmup: float, final: float) -> Callable[[int], float]:
    """Factor of the peak learning rate at a step: linear up over `warmup · max_steps`, cosine down to `final`."""
    rising = max(1, round(warmup * max_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        progress = min(1.0, (step - rising) / max(1, max_steps - rising))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def logs_this_step(trainer: Trainer) -> bool:
    """Whether loggers write the metrics of the step under way."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def log_gradient_norm(module: LightningModule) -> None:
    """Log `train/gradient_norm`, the L2 norm of all gradients, at logging steps only, as it reads all of them."""
    if logs_this_step(module.trainer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        module.log("train/gradient_norm", gradient_norm(gradients))
