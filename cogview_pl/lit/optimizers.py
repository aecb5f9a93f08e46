"""Optimizer, learning-rate schedule, and the gradient norm, shared by both stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cogview_pl.transformer.parallel import gradient_norm


@dataclass(frozen=True)
class OptimizerFactory:
    """What `conf/optimizer/` says.

    Args:
        build: parameter groups → optimizer (learning rate and the like already bound).
        weight_decay: of the groups that are decayed.
        warmup: share of the steps in which the learning rate rises linearly from 0.
        final_lr: share of the peak learning rate at which the cosine ends.
    """

    build: Callable[[Iterable[Any]], Optimizer]
    weight_decay: float
    warmup: float
    final_lr: float


class ParameterGroup(NamedTuple):
    """Parameters that the optimizer treats alike."""

    name: str
    """For the logs of the learning rate: `lr-Muon/matrices`."""
    parameters: list[nn.Parameter]
    matrices: bool
    """Whether they are linear maps or filters inside the model, which is what Muon is for."""
    decay: bool


def configure_optimizers(factory: OptimizerFactory, groups: Iterable[ParameterGroup], max_steps: int) -> dict[str, Any]:
    """Lightning's optimizer dictionary, with warm-up and cosine per step."""
    optimizer = factory.build(
        [
            {
                "name": group.name,
                "params": group.parameters,
                "weight_decay": factory.weight_decay if group.decay else 0.0,
                "matrices": group.matrices,
            }
            for group in groups
        ]
    )
    schedule = LambdaLR(optimizer, warmup_cosine(max_steps, factory.warmup, factory.final_lr))
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
    """Whether what is logged in the step under way will be written."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def log_gradient_norm(module: LightningModule) -> None:
    """Log `train/gradient_norm`, the L2 norm over all gradients, at logging steps (it costs a pass over them)."""
    if logs_this_step(module.trainer):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        module.log("train/gradient_norm", gradient_norm(gradients))
