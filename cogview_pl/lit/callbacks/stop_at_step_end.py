"""Ends training between two steps when the process was told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException


class StopAtStepEnd(Callback):
    """Raises Lightning's SIGTERMException behind an optimizer step, once `asked` says so on any device.

    Lightning's own handling would leave inside a validation or between two batches whose gradients are added up, and
    its signal handler talks to the other processes, which hangs while these wait for a gradient.

    Args:
        asked: whether this process was told to stop.
        defer: called with True when steps begin, and with False when they end.
    """

    def __init__(self, asked: Callable[[], bool], defer: Callable[[bool], None]) -> None:
        self._asked = asked
        self._defer = defer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._defer(True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._defer(False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        done = trainer.global_step >= trainer.max_steps
        if between_steps and not done and trainer.strategy.reduce_boolean_decision(self._asked(), all=False):
            raise SIGTERMException
