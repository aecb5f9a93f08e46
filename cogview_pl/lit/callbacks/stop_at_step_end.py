"""Ends training between two steps when the process was told to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer

from cogview_pl.lit.lightning_internals import end_after_this_step, set_logged_step


class StopAtStepEnd(Callback):
    """Has Lightning end the run after an optimizer step, once `asked` is true on any device.

    Lightning's own handler of SIGTERM is not used, for two reasons. It ends a run between two batches whose gradients
    are added up, or inside a validation, and from there no run can go on exactly. And it talks to the other processes
    while they wait for a gradient, so all of them would hang. This callback sets the flag of that handler after a step.

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
        """Set the step of the logs: Lightning counts one too many in a run that was stopped at a validation."""
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        set_logged_step(trainer, done // trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._defer(False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning ends the run after it has logged this step, unless a validation comes first.

        The last step is validated, wherever it lies: Lightning validates before a stop that is asked for.
        """
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stops = trainer.strategy.reduce_boolean_decision(self._asked(), all=False)
            end_after_this_step(trainer, self._stops)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the validation finish."""
        self._listen()
        end_after_this_step(trainer, False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end_after_this_step(trainer, self._stops)
