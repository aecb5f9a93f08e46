"""Samples and tokens per second."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from cogview_pl.data.sequences import SequenceBatch


class Throughput(Callback):
    """Logs `perf/samples_per_s`, and for sequences `perf/tokens_per_s` (padding included), over all devices.

    Validation is not counted: the clock runs from the end of one training batch to the end of the next, and a
    validation in between starts it anew.
    """

    def __init__(self) -> None:
        self._restart()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[0]) * trainer.world_size
        if isinstance(batch, SequenceBatch):
            self._tokens += batch.tokens.numel() * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        seconds = time.perf_counter() - self._since
        pl_module.log("perf/samples_per_s", self._samples / seconds)
        if self._tokens:
            pl_module.log("perf/tokens_per_s", self._tokens / seconds)
        self._restart()

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._samples = self._tokens = 0
