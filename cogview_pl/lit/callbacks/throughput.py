"""Samples and tokens per second, and how long training waited for them."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from cogview_pl.data.sequences import SequenceBatch


class Throughput(Callback):
    """Logs `perf/samples_per_s`, and for sequences `perf/tokens_per_s` (padding included), over all devices.

    `perf/data_wait_share` is the share of the time between two steps, in which batches are made or waited for: when
    it is not small, raise `data.num_workers`.

    Validation is not counted: the clock runs from the end of one training batch to the end of the next, and a
    validation in between starts it anew.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since = self._idle_since = time.perf_counter()
        self._waited = 0.0
        self._samples = self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[0]) * trainer.world_size
        if isinstance(batch, SequenceBatch):
            self._tokens += batch.tokens.numel() * trainer.world_size
        self._idle_since = time.perf_counter()
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        seconds = time.perf_counter() - self._since
        pl_module.log("perf/samples_per_s", self._samples / seconds)
        pl_module.log("perf/data_wait_share", self._waited / seconds)
        if self._tokens:
            pl_module.log("perf/tokens_per_s", self._tokens / seconds)
        self._restart()
