"""Moving averages of the weights in training (EMA), for validation, samples and `model/`."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from cogview_pl.checkpoints.training_checkpoint import AVERAGES

_DISCRIMINATOR = "adversarial."  # names of its weights begin so; nothing uses averages of them
_RAMP = 10  # after n steps the average reaches back over a tenth of them, until `decay` is the smaller share


class EMA(Callback):
    """Keeps an exponential moving average of each trained weight, in fp32, and validates with the averages.

    After step n the average is d · average + (1 - d) · weight, where d = min(`decay`, (1 + n) / (10 + n)): with a
    constant decay the random initial weights would count for thousands of steps. Buffers are not averaged, so an EMA
    codebook is that of the weights in training. Checkpoints hold the weights in training and the averages.

    Lightning's own callback takes the weights back before `on_validation_end`, where samples are made and checkpoints
    saved. It swaps buffers too, leaves averages in the model if a validation fails, copies the whole module, and cannot
    read checkpoints without frozen weights. It must stand after callbacks that use the model in `on_validation_end`.

    Args:
        decay: share of the average that a step keeps, after the first steps.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._averages: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] | None = None
        self._in_training: dict[str, Tensor] | None = None
        self._step = 0

    @torch.no_grad()
    def use_averages(self, module: LightningModule) -> None:
        """Put the averages into the module for good."""
        self._begin(module)
        for name, weight in _trained(module).items():
            weight.copy_(self._averages[name])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the averages after a step of the optimizer."""
        if trainer.global_step == self._step:  # the gradients of further batches belong to the step
            return
        self._step = trainer.global_step
        decay = min(self._decay, (1 + self._step) / (_RAMP + self._step))
        for name, weight in _trained(pl_module).items():
            self._averages[name].lerp_(weight.float(), 1 - decay)

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averages into the module, and keep its weights."""
        self._begin(pl_module)
        weights = _trained(pl_module)
        self._in_training = {name: weight.clone() for name, weight in weights.items()}
        self.use_averages(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the weights back, before a checkpoint is saved."""
        self._take_back(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[AVERAGES] = dict(self._averages)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(AVERAGES)

    @torch.no_grad()
    def _begin(self, module: LightningModule) -> None:
        """Start with the weights of the module, or with the averages of a checkpoint."""
        if self._averages:
            return
        self._averages = {name: weight.detach().float().clone() for name, weight in _trained(module).items()}
        for name, average in (self._restored or {}).items():
            self._averages[name].copy_(average)
        self._restored = None

    @torch.no_grad()
    def _take_back(self, module: LightningModule) -> None:
        if self._in_training is not None:
            for name, weight in _trained(module).items():
                weight.copy_(self._in_training[name])
            self._in_training = None


def _trained(module: LightningModule) -> dict[str, torch.nn.Parameter]:
    found = module.named_parameters()
    return {name: weight for name, weight in found if weight.requires_grad and not name.startswith(_DISCRIMINATOR)}
