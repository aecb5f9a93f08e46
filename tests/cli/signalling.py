"""A callback that sends a signal to its own process, to stop a run at a given step."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning import Callback, LightningModule, Trainer


class SignalAt(Callback):
    """Sends a signal in the middle of a step.

    Args:
        step: number of the step, counted from 1.
        name: name of the signal.
    """

    def __init__(self, step: int, name: str = "SIGTERM") -> None:
        self._step = step
        self._signal = signal.Signals[name]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self._step:
            os.kill(os.getpid(), self._signal)
