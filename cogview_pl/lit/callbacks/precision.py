"""Logs the dynamic loss scale of `precision=fp16` and the steps that it skips."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class LossScale(Callback):
    """Logs `precision/loss_scale` and `precision/skipped_steps`; nothing in other precisions.

    The scaler multiplies the loss by its scale before the backward pass, so that small gradients do not underflow in
    fp16, and divides the gradients by it before the step. A step with an infinite or NaN gradient is skipped and halves
    the scale; 2,000 steps without one double it. A skipped step now and then is normal. Many skipped steps in a row
    mean that activations overflow (see `activations/`).
    """

    def __init__(self) -> None:
        self._skipped = 0
        self._scale: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scale = _scale(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._scale = self._scale, _scale(trainer)
        if before is None or self._scale is None:
            return
        self._skipped += self._scale < before  # nothing else makes it smaller
        pl_module.log("precision/loss_scale", self._scale)
        pl_module.log("precision/skipped_steps", float(self._skipped))


def _scale(trainer: Trainer) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
