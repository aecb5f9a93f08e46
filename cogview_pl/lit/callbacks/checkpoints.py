"""Checkpoints of a run: Lightning's ModelCheckpoint, except at a stop and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cogview_pl.lit.lightning_internals import LastCheckpoint, stops_early


class Checkpoints(LastCheckpoint):
    """Writes `last.ckpt` after the last step too, and only that file when a run is stopped.

    Lightning leaves out the steps after the last multiple of `every_n_train_steps`, also where early stopping or
    `max_time` ends a run. When a run is stopped it would also
    write `step_N.ckpt`. That takes twice the time of the few seconds that are left, and Lightning neither counts nor
    deletes that file, so each stop would leave one more.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take file names from a checkpoint, not their folders: old files get deleted, and a path may lead anywhere.

        A run whose folder was moved goes on deleting its own old files.
        """
        found = state_dict.get("best_k_models")
        best = {self._own(path): score for path, score in found.items()} if isinstance(found, dict) else {}
        best.pop("", None)
        worst = self._own(state_dict.get("kth_best_model_path"))
        names = {name: self._own(state_dict.get(name)) for name in ("best_model_path", "last_model_path")}
        super().load_state_dict(
            {
                **state_dict,
                **names,
                "dirpath": self.dirpath,
                "best_k_models": best,
                "kth_best_model_path": worst if worst in best else next(iter(best), ""),
            }
        )

    def _own(self, path: object) -> str:
        """The checkpoint of that name in this run's folder; empty for other files."""
        name = Path(str(path)).name
        return str(Path(str(self.dirpath)) / name) if name.endswith(".ckpt") else ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step >= trainer.max_steps or stops_early(trainer):
            self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if stops_early(trainer):  # EarlyStopping has just decided
            self._save_end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_end(trainer)  # a hook after those above may have ended the run

    def _save_end(self, trainer: Trainer) -> None:
        if not self.is_saved(trainer):
            self.save_last_checkpoint(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if a run can go on exactly from here.

        An exception inside a step leaves a half-made state. An exception in one of several processes cannot be saved,
        because saving needs all of them.
        """
        stopped = isinstance(exception, SIGTERMException)
        exact = stopped or (trainer.world_size == 1 and _between_steps(trainer))
        if exact and self.saves_on_exception(trainer):
            self.save_last_checkpoint(trainer)


def _between_steps(trainer: Trainer) -> bool:
    """Whether no batch is under way, and no gradient waits for the other batches of its step."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return batches.ready == batches.completed and batches.completed % trainer.accumulate_grad_batches == 0
