"""The checkpoints that a run keeps: a check of their options before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cogview_pl.errors import UserError
from cogview_pl.lit.callbacks.checkpoints import STEP, mode_of

_MONITOR = "callbacks.checkpoint.monitor"
_MODES = ("min", "max")
_KNOWN = ("cogview_pl.", "lightning.")  # packages whose callbacks log no metrics of a validation


def check_kept(callbacks: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Raises UserError for checkpoints that are to be the best by a metric that does not exist, or in no known order.

    Args:
        callbacks: `callbacks` of the configuration.
        metrics: names of the metrics that a validation of this task logs. Callbacks of the user may log others.
    """
    node = callbacks.get("checkpoint") or {}
    monitor, mode = node.get("monitor"), node.get("mode")
    if mode is not None and mode not in _MODES:
        raise UserError(f"callbacks.checkpoint.mode={mode} must be min, max or null")
    if monitor in (None, STEP, *metrics):
        return
    if all(str(other.get("_target_")).startswith(_KNOWN) for other in callbacks.values()):
        raise UserError(
            f"{_MONITOR}={monitor}: the validation of this task has no such metric; choose {STEP}, or one of "
            f"{', '.join(metrics)}"
        )
    if mode is None and mode_of(str(monitor)) is None:
        raise UserError(f"{_MONITOR}={monitor}: set callbacks.checkpoint.mode=min, or max if larger is better")
