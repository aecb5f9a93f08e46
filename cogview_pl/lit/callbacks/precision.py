"""The dynamic loss scale of `precision=fp16`: how large it is, and how many steps it cost."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class LossScale(Callback):
    """Logs `precision/loss_scale` and `precision/skipped_steps`; nothing in other precisions.

    The loss is multiplied by the scale before the backward pass, so that small gradients are not lost in fp16, and
    gradients are divided by it before the step. Where one is infinite or no number, the step is skipped and the scale
    halved; it doubles after 2,000 steps without such. Now and then a skipped step is how the scale finds its place;
    one after the other means that activations overflow (see `activations/`).
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
