"""The checkpoints that a run keeps, the averages of its weights, and the weights that become `model/`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer

from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.strategy import DEEPSPEED
from cogview_pl.checkpoints.training_checkpoint import AVERAGES
from cogview_pl.errors import UserError
from cogview_pl.lit.callbacks import EMA, Checkpoints
from cogview_pl.lit.callbacks.checkpoints import MEGABYTE, STEP, mode_of
from cogview_pl.lit.config import ModelFrom
from cogview_pl.transformer.parallel import load_weights

_MONITOR = "callbacks.checkpoint.monitor"
_DECAY = "callbacks.ema.decay"
_MODES = ("min", "max")
_KNOWN = ("cogview_pl.", "lightning.")  # packages whose callbacks log no metrics of a validation


def check_kept(options: TrainingOptions, metrics: Sequence[str]) -> None:
    """Raises UserError for a monitor or `model_from` that no checkpoint can have, and for averages of sharded weights.

    Args:
        options: options of the run.
        metrics: names of the metrics that a validation of this task logs. Callbacks of the user may log others.
    """
    node = options.callbacks.get("checkpoint") or {}
    _check_monitor(options.callbacks, node.get("monitor"), node.get("mode"), metrics)
    if options.model_from == ModelFrom.best:
        _check_best(options, node, metrics)
    check_averages(options)


def check_averages(options: TrainingOptions) -> None:
    """Raises UserError for averages of sharded weights."""
    decay = ema_decay(options.callbacks)
    if decay is not None and options.strategy.kind.sharded:
        raise UserError(
            f"{_DECAY}={decay} averages full weights, and strategy={options.strategy.kind.value} divides them; set "
            f"strategy=ddp, or {_DECAY}=null"
        )


def ema_decay(callbacks: Mapping[str, Any]) -> float | None:
    """`callbacks.ema.decay`; None: the run has no averages."""
    return (callbacks.get("ema") or {}).get("decay")


def background_bytes(callbacks: Mapping[str, Any]) -> float:
    """Size from which a checkpoint is written from a copy, while training goes on; infinite: none is."""
    limit = (callbacks.get("checkpoint") or {}).get("background_mb")
    return math.inf if limit is None else limit * MEGABYTE


def settings_of_kept(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without which a resumed run would have other averages, or would forget the best step."""
    monitor = (callbacks.get("checkpoint") or {}).get("monitor")
    return {_DECAY: ema_decay(callbacks), _MONITOR: monitor}


def take_final_weights(
    options: TrainingOptions, trainer: Trainer, module: LightningModule, *, writes: bool
) -> dict[str, float]:
    """Put the weights that become `model/` into the module: of the last or the best step, averages where there are any.

    Args:
        options: options of the run.
        trainer: after its training.
        module: module in training.
        writes: whether this process writes `model/`.

    Returns:
        `model/step`; of the best step also its metric.

    Raises:
        UserError: the file of the best checkpoint is gone.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if options.model_from == ModelFrom.last or trainer.fast_dev_run:  # type: ignore[attr-defined]  # a trial saves none
        for ema in (callback for callback in callbacks if isinstance(callback, EMA)):
            ema.use_averages(module)
        return {"model/step": trainer.global_step}
    if not writes and not options.strategy.kind.sharded:
        return {}
    kept = next(callback for callback in callbacks if isinstance(callback, Checkpoints))
    file = Path(kept.best_model_path)
    if not file.is_file() or kept.best_model_score is None:
        raise UserError(f"model_from=best: {file} is gone; go on with model_from=last, or from another checkpoint")
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    weights = {**saved["state_dict"], **saved.get(AVERAGES, {})}
    load_weights(module, {**module.state_dict(), **weights})  # frozen weights are in no checkpoint
    return {"model/step": saved["global_step"], f"model/{kept.monitor}": float(kept.best_model_score)}


def _check_monitor(callbacks: Mapping[str, Any], monitor: Any, mode: Any, metrics: Sequence[str]) -> None:
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


def _check_best(options: TrainingOptions, node: Mapping[str, Any], metrics: Sequence[str]) -> None:
    if node.get("monitor") in (None, STEP):
        raise UserError(
            f"model_from=best: {_MONITOR}={node.get('monitor')} compares no validations, so no step is the best; set "
            f"{_MONITOR}={metrics[0]}, or model_from=last"
        )
    if node.get("save_top_k") == 0:
        raise UserError("model_from=best: callbacks.checkpoint.save_top_k=0 keeps no best checkpoint; set it to 1")
    if options.strategy.kind in DEEPSPEED:
        raise UserError(
            f"model_from=best: checkpoints of strategy={options.strategy.kind.value} are folders, which hold shards; "
            "set model_from=last"
        )
