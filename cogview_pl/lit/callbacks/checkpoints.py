"""Checkpoints of a run: Lightning's ModelCheckpoint, which saves at other moments here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cogview_pl.errors import UserError
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.lit.lightning_internals import LastCheckpoint, stops_early, validates_next

STEP = "step"
"""The metric that keeps the newest checkpoint."""

MEGABYTE = 10**6

_MORE_IS_BETTER = (STEP, "eval/psnr", "codebook/usage", "codebook/perplexity")


def mode_of(metric: str) -> str | None:
    """`max` if a metric is better when it is larger, `min` for losses; None for metrics of other programs."""
    if metric in _MORE_IS_BETTER:
        return "max"
    return "min" if "loss" in metric else None


class Checkpoints(LastCheckpoint):
    """Keeps the newest checkpoint, or the best by a metric of the validation, and `last.ckpt`.

    Lightning saves a step before its validation, and compares the metric of the validation before. It puts off the
    checkpoint of the last batch of an epoch until the next validation, which may be thousands of steps later. It leaves
    out the steps after the last multiple of `every_n_train_steps`, also where early stopping or `max_time` ends a run.
    When a run is stopped it would also write `step_N.ckpt`. That takes twice the time of the few seconds that are left,
    and Lightning neither counts nor deletes that file, so each stop would leave one more.

    Large checkpoints are written while training goes on; see `DurableCheckpointIO`, which the trainer must have. The
    last one of a run is written at once, and the run ends when it is on the disk.

    Args:
        monitor: `step`, or a metric of the validation; then a step is saved after its validation.
        mode: `min` or `max`; None: as `mode_of` says.
        background_mb: size, in units of 10^6 bytes, from which a checkpoint is large; None: none is.
        options: arguments of Lightning's ModelCheckpoint.
    """

    def __init__(
        self, *, monitor: str = STEP, mode: str | None = None, background_mb: float | None = None, **options: Any
    ) -> None:
        super().__init__(monitor=monitor, mode=mode or mode_of(monitor) or "min", **options)
        self._background_bytes = math.inf if background_mb is None else background_mb * MEGABYTE

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        _writer(trainer).background_bytes = self._background_bytes

    def link(self, trainer: Trainer, source: str, path: str) -> bool:
        """Give a checkpoint that was just saved a second name; folders, as DeepSpeed writes them, get none."""
        writer = _writer(trainer)
        links: bool = trainer.strategy.broadcast(writer.has_written(source))
        if links and trainer.is_global_zero:
            writer.link_checkpoint(source, path)
        return links

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints; a run that goes on may save at other steps."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def follows_validation(self) -> bool:
        """Whether the best checkpoints are chosen by a metric of the validation."""
        return self.monitor not in (None, STEP)

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
        """Save what is due, and the last step of the run; a step that is validated next is saved after that."""
        _writer(trainer).raise_error()
        due = self.is_due(trainer)
        ends = trainer.global_step >= trainer.max_steps or stops_early(trainer)
        if self.follows_validation:
            if (due or ends) and not validates_next(trainer):
                self._save_end(trainer)
        elif due and not self.is_saved(trainer):
            self.save_best_and_last(trainer)
        elif ends:
            self._save_end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step if its validation is among the best, and `last.ckpt`, which then knows of it."""
        if not self.follows_validation:
            if stops_early(trainer):  # EarlyStopping has just decided
                self._save_end(trainer)
            return
        if self.is_over(trainer):
            return
        if not self.has_metric(trainer):
            found = ", ".join(sorted(name for name in trainer.callback_metrics if not name.startswith("train/")))
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor}: the validation has no such metric; choose one of {found}"
            )
        self.save_best_and_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs have no epochs."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and wait until the files are there, which all processes may read then."""
        self._save_end(trainer)  # a hook after those above may have ended the run
        _writer(trainer).wait()
        trainer.strategy.barrier()

    def _save_end(self, trainer: Trainer) -> None:
        if not self.is_saved(trainer):
            self._save_at_once(trainer)

    def _save_at_once(self, trainer: Trainer) -> None:
        with _writer(trainer).in_foreground():
            self.save_last_checkpoint(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, if a run can go on exactly from here, and wait for what is being written.

        An exception inside a step leaves a half-made state. An exception in one of several processes cannot be saved,
        because saving needs all of them.
        """
        stopped = isinstance(exception, SIGTERMException)
        exact = stopped or (trainer.world_size == 1 and _between_steps(trainer))
        if exact and self.saves_on_exception(trainer):
            self._save_at_once(trainer)
        _writer(trainer).wait()


def _writer(trainer: Trainer) -> DurableCheckpointIO:
    found = trainer.strategy.checkpoint_io
    if not isinstance(found, DurableCheckpointIO):
        raise TypeError("Checkpoints needs a trainer with plugins=[DurableCheckpointIO()]")
    return found


def _between_steps(trainer: Trainer) -> bool:
    """Whether no batch is under way, and no gradient waits for the other batches of its step."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.total
    return batches.ready == batches.completed and batches.completed % trainer.accumulate_grad_batches == 0
