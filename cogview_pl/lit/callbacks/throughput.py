"""Samples and tokens per second, the share of time spent waiting for data, and model FLOPs utilisation."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.lit.callbacks.device_peaks import peak_tflops
from cogview_pl.lit.data_module import data_share
from cogview_pl.lit.sequence_model import SequenceModule


class Throughput(Callback):
    """Logs throughput at logging steps. Validation is not counted.

    - `perf/samples_per_s`, over all devices.
    - `perf/data_wait_share`: share of the time in which training waits for batches; if it is large, raise
      `data.num_workers`.
    - `perf/tokens_per_s`, for sequences, over all devices, padding included.
    - `perf/model_tflops`, for sequences: 10¹² operations per second that the model needs (`transformer/flops.py`), over
      all devices.
    - `perf/mfu`: model FLOPs utilisation, the share (0 … 1) of the devices' peak; left out if the peak is unknown.

    Args:
        peak_tflops: peak of one device in 10¹² operations per second, in the run's precision; None: the GPU's entry in
            `device_peaks.py`.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self._restart()

    def _restart(self) -> None:
        self._since = self._idle_since = time.perf_counter()
        self._waited = 0.0
        self._samples = self._tokens = 0
        self._flops: Tensor | int = 0  # a tensor on the device, because reading it waits for the step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _, shares = data_share(trainer)
        self._samples += len(batch[0]) * shares
        if isinstance(batch, SequenceBatch):
            self._tokens += batch.tokens.numel() * shares
        if isinstance(pl_module, SequenceModule):
            self._flops += pl_module.training_flops(batch) * shares
        self._idle_since = time.perf_counter()
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        flops = int(self._flops)  # waits for the step, so it comes before the clock is read
        seconds = time.perf_counter() - self._since
        pl_module.log("perf/samples_per_s", self._samples / seconds)
        pl_module.log("perf/data_wait_share", self._waited / seconds)
        if self._tokens:
            pl_module.log("perf/tokens_per_s", self._tokens / seconds)
        if flops:
            tflops = flops / seconds / 1e12
            pl_module.log("perf/model_tflops", tflops)
            peak = self.peak_tflops or _peak(pl_module.device, str(trainer.precision))
            if peak is not None:
                pl_module.log("perf/mfu", tflops / (peak * trainer.world_size))
        self._restart()


def _peak(device: torch.device, precision: str) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
