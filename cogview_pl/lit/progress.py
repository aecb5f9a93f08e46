"""Progress of a training: optimizer steps and the losses that matter."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from cogview_pl.lit.bars import Bar


class TrainingBar(ProgressBar):
    """A bar of the training and one of each validation.

    The bar of the training counts optimizer steps of `trainer.max_steps` and shows the metrics that the module names
    in `shown_metrics`.

    Args:
        terminal_seconds: time between two drawings on a terminal.
        file_seconds: time between two lines where standard error is a file or a pipe.
    """

    def __init__(self, terminal_seconds: float, file_seconds: float) -> None:
        super().__init__()
        self._new_bar = partial(Bar, terminal_seconds=terminal_seconds, file_seconds=file_seconds)
        self._enabled = True
        self._training: Bar | None = None
        self._validation: Bar | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._training = self._new_bar("train", total, "steps", done=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._training is not None:
            self._training.reach(trainer.global_step, lambda: _note(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(keep=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and not trainer.sanity_checking:
            batches = int(sum(trainer.num_val_batches))
            self._validation = self._new_bar("validate", batches, "batches")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validation is not None:
            self._validation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    def _close(self, *, keep: bool = False) -> None:
        for bar in (self._validation, self._training):
            if bar is not None:
                bar.close(keep=keep)
        self._validation = self._training = None


def _note(trainer: Trainer, module: LightningModule) -> str:
    """Such as `loss 0.532, psnr 24.1`: the metrics of the last step that logged them."""
    found = trainer.callback_metrics
    names = [name for name in getattr(module, "shown_metrics", ("train/loss",)) if name in found]
    return ", ".join(f"{name.rpartition('/')[2]} {float(found[name]):#.4g}" for name in names)
