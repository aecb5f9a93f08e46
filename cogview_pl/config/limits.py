"""Refuses numbers that no run could use, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from cogview_pl.errors import UserError
from cogview_pl.limits import out_of_range

_OF_LIGHTNING: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("a whole number, at least 1", lambda value: value >= 1 and value % 1 == 0, """
        trainer.max_steps trainer.val_check_interval trainer.accumulate_grad_batches trainer.log_every_n_steps
        callbacks.nan_guard.patience callbacks.checkpoint.every_n_train_steps"""),
    ("above 0", lambda value: value > 0, "callbacks.throughput.peak_tflops"),
)  # fmt: skip
"""Of nodes that are no dataclass: they are given to Lightning, or to a class that the user names."""


def check_limits(config: DictConfig) -> None:
    """Raises UserError for a number out of its range, naming the key. What depends on several keys is checked later."""
    for key, value, words in out_of_range(OmegaConf.to_object(config)):
        raise UserError(f"{key}={value} must be {words}")
    for words, holds, keys in _OF_LIGHTNING:
        for key in keys.split():
            value = OmegaConf.select(config, key)
            if value is not None and not (isinstance(value, (int, float)) and holds(value)):
                raise UserError(f"{key}={value} must be {words}")
