"""Refuses numbers out of range, before any file is opened."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from cogview_pl.errors import UserError
from cogview_pl.limits import ABOVE_0, AT_LEAST_0, COUNT, SHARE_BELOW_1, out_of_range

_OPEN_NODES = {
    "trainer.max_steps": COUNT,
    "trainer.val_check_interval": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.log_every_n_steps": COUNT,
    "optimizer.optimizer.lr": AT_LEAST_0,
    "optimizer.optimizer.matrix_lr": AT_LEAST_0,
    "callbacks.nan_guard.patience": COUNT,
    "callbacks.checkpoint.every_n_train_steps": COUNT,
    "callbacks.checkpoint.background_mb": AT_LEAST_0,
    "callbacks.ema.decay": SHARE_BELOW_1,
    "callbacks.throughput.peak_tflops": ABOVE_0,
}
"""Limits of keys that are in no dataclass, because they are arguments of Lightning's classes or of callbacks."""


def check_limits(config: DictConfig) -> None:
    """Raises UserError that names a key with a number out of range. Other modules check combinations of keys."""
    for key, value, words in out_of_range(OmegaConf.to_object(config)):
        raise UserError(f"{key}={value} must be {words}")
    for key, limit in _OPEN_NODES.items():
        value = OmegaConf.select(config, key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and limit.holds(value)):
            raise UserError(f"{key}={value} must be {limit.words}")
