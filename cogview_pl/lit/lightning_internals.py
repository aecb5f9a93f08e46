"""Private names of Lightning, torch and torchao. No other file of this room uses any.

Each name says what breaks without it. Checked against Lightning 2.6.6, torch 2.15 and torchao 0.18.
"""

from __future__ import annotations

import time
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils._pytree import tree_leaves as tree_leaves  # else copying checkpoints needs a recursion of our own
from torch.utils._pytree import tree_map as tree_map  # else gathering optimizer states needs a recursion of our own


def end_after_this_step(trainer: Trainer, wanted: bool) -> None:
    """Have Lightning raise SIGTERMException once it has logged this step; else no stopped run could go on exactly."""
    trainer._signal_connector.received_sigterm = wanted  # type: ignore[attr-defined]


def set_logged_step(trainer: Trainer, step: int) -> None:
    """Set the step in the logs; else it is too large by one after a stop at a validation."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def stops_early(trainer: Trainer) -> bool:
    """Whether a callback ends the run before `max_steps`; else its last steps have no checkpoint."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


class LastCheckpoint(ModelCheckpoint):
    """Saves when it is told to; else a run's last steps have no checkpoint, and each stop leaves a file more.

    Where the checkpoint of a step is `last.ckpt` too, it is written once and gets two names. Files that drop out of the
    best are deleted after `last.ckpt` is written. A run that is killed in between goes on from the earlier `last.ckpt`,
    which still names them.
    """

    _dropped: list[str] | None = None
    _twin = ""  # the checkpoint of this step, while `last.ckpt` is to follow

    def link(self, trainer: Trainer, source: str, path: str) -> bool:
        """Give a checkpoint that was just saved a second name; returns whether it has got one, in all processes."""
        raise NotImplementedError

    def save_last_checkpoint(self, trainer: Trainer) -> None:
        """Write `last.ckpt`."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def save_best_and_last(self, trainer: Trainer) -> None:
        """Write the checkpoint of this step if it is among the best by the monitored metric, then `last.ckpt`."""
        candidates = self._monitor_candidates(trainer)
        if self.save_last and not self._enable_version_counter:  # both names of a file have the same state
            self.last_model_path = self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST)
        self._dropped = []
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
        dropped, self._dropped, self._twin = self._dropped, None, ""
        for file in dropped:
            self._remove_checkpoint(trainer, file)

    def has_metric(self, trainer: Trainer) -> bool:
        """Whether the monitored metric was logged."""
        return self.monitor in self._monitor_candidates(trainer)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether `every_n_train_steps` or `train_time_interval` asks for a checkpoint after this step."""
        if self._train_time_interval is None:
            return self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0
        now = time.monotonic()
        passed = now - (self._last_time_checked or now) >= self._train_time_interval.total_seconds()
        if trainer.strategy.broadcast(passed):
            self._last_time_checked = now
            return True
        return False

    def is_saved(self, trainer: Trainer) -> bool:
        """Whether this step has its checkpoint, or gets none outside of training."""
        return self._should_skip_saving_checkpoint(trainer)

    def is_over(self, trainer: Trainer) -> bool:
        """Whether checkpoints are not saved now, in any step."""
        return trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]

    def saves_on_exception(self, trainer: Trainer) -> bool:
        """Whether an exception in this step makes a checkpoint."""
        return self._should_save_on_exception(trainer)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._twin and self.link(trainer, self._twin, filepath):
            return
        super()._save_checkpoint(trainer, filepath)
        if self._dropped is not None:
            self._twin = filepath

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._dropped is None:
            super()._remove_checkpoint(trainer, filepath)
        else:
            self._dropped.append(filepath)


def validates_next(trainer: Trainer) -> bool:
    """Whether a validation follows this step; else a checkpoint is written before the validation of its step."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def set_mesh_sizes(strategy: ModelParallelStrategy, *, data_parallel: int, tensor_parallel: int) -> None:
    """Set the mesh once the number of devices is known; else users must repeat trainer.devices in the strategy."""
    strategy._data_parallel_size = data_parallel
    strategy._tensor_parallel_size = tensor_parallel


def torchao_adamw(optim: Any) -> Any:
    """AdamW of `torchao.optim` with stochastic rounding and plain moments; else there is no optimizer=adamw_bf16."""
    return optim._AdamW
