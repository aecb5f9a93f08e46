"""Lightning's ModelCheckpoint, but for what it writes when a run is stopped, and at its end."""

from __future__ import annotations

from pathlib import Path
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take names from a checkpoint, and never its paths: old files are deleted, and paths may lead anywhere.

        So a folder that was moved is tidied up as well.
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
        """The checkpoint of that name in this run's folder; empty for what is no checkpoint."""
        name = Path(str(path)).name
        return str(Path(str(self.dirpath)) / name) if name.endswith(".ckpt") else ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step >= trainer.max_steps and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if a run can go on exactly from here.

        Not where this step has been saved, inside a step, or where other processes have not met the exception: saving
        needs them.
        """
        stopped = isinstance(exception, SIGTERMException)
        exact = stopped or (trainer.world_size == 1 and _between_steps(trainer))
        if exact and self._should_save_on_exception(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


def _between_steps(trainer: Trainer) -> bool:
    """Whether no batch is under way, and none of those that the next step adds up has been through."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return batches.ready == batches.completed and batches.completed % trainer.accumulate_grad_batches == 0
