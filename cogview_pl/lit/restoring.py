"""Fits a checkpoint to a run that goes on with other options."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule

_COUNTS = ("ready", "started", "processed", "completed")


def fit_to_accumulation(module: LightningModule, accumulate: int) -> None:
    """Have checkpoints count batches as if each of their steps had had `accumulate` batches.

    Lightning finds the end of a step, and the next validation, by the number of a batch. After a change of
    `accumulate_grad_batches` the first step would have too few batches, and validations would move.
    """
    hook = module.on_load_checkpoint

    def load(checkpoint: dict[str, Any]) -> None:
        _count_anew(checkpoint, accumulate)
        hook(checkpoint)

    module.on_load_checkpoint = load  # type: ignore[method-assign]


def _count_anew(checkpoint: dict[str, Any], accumulate: int) -> None:
    progress = checkpoint["loops"].get("fit_loop", {}).get("epoch_loop.batch_progress")
    steps = checkpoint.get("global_step", 0)
    if not progress or not steps:
        return
    before = progress["total"]["processed"] // steps
    if before == accumulate or before * steps != progress["total"]["processed"]:
        return
    for part in ("total", "current"):
        counts = progress[part]
        shift = counts["processed"] // before * accumulate - counts["processed"]
        counts.update({name: counts[name] + shift for name in _COUNTS})
    data = checkpoint.get("DataModule")
    if data is not None:
        data["batches"] = progress["total"]["processed"]
