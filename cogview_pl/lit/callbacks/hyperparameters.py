"""Gives the loggers the hyperparameters of a run."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from cogview_pl.lit.config import OF_VALIDATION


class Hyperparameters(Callback):
    """Logs hyperparameters when training begins; TensorBoard gets them at its end, with the final metrics.

    Args:
        values: key → plain value.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(OF_VALIDATION)
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and found:
                logger.log_hyperparams(self.values, found, trainer.global_step - 1)  # as the last validation
