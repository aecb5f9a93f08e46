"""Lightning's ModelCheckpoint, but for what it writes when a run is stopped, and at its end."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class Checkpoints(ModelCheckpoint):
    """Writes `last.ckpt` behind the last step too, and it alone when a run is stopped.

    Lightning leaves out the steps behind the last multiple of `every_n_train_steps`. When a run is stopped it would
    write `step_N.ckpt` as well, which takes twice the time of the few seconds that are left, and which it never counts
    nor deletes: a file more with each stop.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step >= trainer.max_steps and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless this step has been saved, or other processes have not met the exception: saving needs them."""
        alone = trainer.world_size > 1 and not isinstance(exception, SIGTERMException)
        if not alone and self._should_save_on_exception(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
