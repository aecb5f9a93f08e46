"""Ends training between two steps when the process was told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer


class StopAtStepEnd(Callback):
    """Has Lightning end the run behind an optimizer step, once `asked` says so on any device.

    Lightning's own handler of SIGTERM would end it between two batches whose gradients are added up, or inside a
    validation, from where going on is not exact; and it talks to the other processes, which hangs while these wait for
    a gradient. So it is not called: what it sets is set here, when the time has come.

    Args:
        asked: whether this process was told to stop.
        listen: install our signal handlers, where Lightning has put its own.
        defer: called with True when steps begin, and with False when they end.
    """

    def __init__(self, asked: Callable[[], bool], listen: Callable[[], None], defer: Callable[[bool], None]) -> None:
        self._asked = asked
        self._listen = listen
        self._defer = defer
        self._stops = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()
        self._defer(True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the step that loggers are told; Lightning counts one more in a run that was stopped at a validation."""
        loop = trainer.fit_loop.epoch_loop
        done = loop.batch_progress.total.processed  # type: ignore[attr-defined]
        loop._batches_that_stepped = done // trainer.accumulate_grad_batches

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._defer(False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning ends the run when it has logged this step, if no validation comes before that."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stops = trainer.strategy.reduce_boolean_decision(self._asked(), all=False)
            _end_soon(trainer, self._stops)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate to the end."""
        self._listen()
        _end_soon(trainer, False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _end_soon(trainer, self._stops)


def _end_soon(trainer: Trainer, whether: bool) -> None:
    trainer._signal_connector.received_sigterm = whether  # type: ignore[attr-defined]
