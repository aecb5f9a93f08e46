"""Private names of Lightning, torch and torchao. No other file of this room uses any.

Each name says what breaks without it. Checked against Lightning 2.6.6, torch 2.15 and torchao 0.18.
"""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
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
    """Can write `last.ckpt` alone; else a run's last steps have no checkpoint, and each stop leaves a file more."""

    def save_last_checkpoint(self, trainer: Trainer) -> None:
        """Write `last.ckpt`."""
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def is_saved(self, trainer: Trainer) -> bool:
        """Whether this step has its checkpoint, or gets none outside of training."""
        return self._should_skip_saving_checkpoint(trainer)

    def saves_on_exception(self, trainer: Trainer) -> bool:
        """Whether an exception in this step makes a checkpoint."""
        return self._should_save_on_exception(trainer)


def set_mesh_sizes(strategy: ModelParallelStrategy, *, data_parallel: int, tensor_parallel: int) -> None:
    """Set the mesh once the number of devices is known; else users must repeat trainer.devices in the strategy."""
    strategy._data_parallel_size = data_parallel
    strategy._tensor_parallel_size = tensor_parallel


def torchao_adamw(optim: Any) -> Any:
    """AdamW of `torchao.optim` with stochastic rounding and plain moments; else there is no optimizer=adamw_bf16."""
    return optim._AdamW
