"""Private names of Lightning, torch and torchao that this room uses; no other file of it does.

Each says what it is for, what breaks without it, and the version it was checked against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils._pytree import tree_map


def end_after_this_step(trainer: Trainer, wanted: bool) -> None:
    """Have Lightning raise SIGTERMException when it has logged the step under way.

    Lightning 2.6.6. Without it a stopped run would end inside accumulated gradients or a validation, from where it
    cannot go on exactly.
    """
    trainer._signal_connector.received_sigterm = wanted  # type: ignore[attr-defined]


def set_logged_step(trainer: Trainer, step: int) -> None:
    """Set the step that loggers are given next.

    Lightning 2.6.6. Without it the steps in the logs of a run that was stopped at a validation are too large by one.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


class LastCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that can write `last.ckpt` alone.

    Lightning 2.6.6. Without these names the last steps of a run would have no checkpoint, and a stop would write two.
    """

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
    """Set the mesh of a strategy before it makes it, when the number of devices is known.

    Lightning 2.6.6. Without it the constructor would need numbers that the configuration gives to the Trainer.
    """
    strategy._data_parallel_size = data_parallel
    strategy._tensor_parallel_size = tensor_parallel


def map_tensors(change: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every value in nested dicts and lists.

    torch 2.15. Without it the states of sharded optimizers would need a recursion of our own.
    """
    return tree_map(change, tree)


def multiply_each(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors in place, in one kernel.

    torch 2.15. Without it Muon takes one kernel for each tensor.
    """
    torch._foreach_mul_(tensors, factor)


def add_to_each(tensors: list[Tensor], others: tuple[Tensor, ...], factor: float) -> None:
    """Add `factor · other` to each tensor in place, in one kernel.

    torch 2.15. Without it Muon takes one kernel for each tensor.
    """
    torch._foreach_add_(tensors, others, alpha=factor)


def torchao_adamw(optim: Any) -> Any:
    """AdamW with stochastic rounding and plain moments, out of `torchao.optim`.

    torchao 0.18. Without it there is no optimizer=adamw_bf16.
    """
    return optim._AdamW
