"""Lightning's ModelCheckpoint, but for what it writes when a run is stopped."""

from __future__ import annotations

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """A stopped run writes `last.ckpt` alone.

    Lightning would write `step_N.ckpt` as well, which takes twice the time of the few seconds that are left, and which
    it never counts nor deletes: a file more with each stop.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless this step has been saved."""
        if self._should_save_on_exception(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
