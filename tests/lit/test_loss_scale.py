"""precision=fp16: what the loss scaler does when gradients overflow, on a CPU, and what the logs say of it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cogview_pl.lit.callbacks import LossScale

START, PATIENCE = 2.0**14, 3  # first scale; steps without an overflow until it doubles


class Line(LightningModule):
    """One weight in fp32, arithmetic in fp16; the gradient of step k is `slopes[k]` before scaling."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.slopes = slopes
        self.seen: list[tuple[float, float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(torch.ones(1, 1)).float().sum() * self.slopes[batch_idx]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = self.trainer.callback_metrics
        scale, skipped = metrics["precision/loss_scale"], metrics["precision/skipped_steps"]
        self.seen.append((float(self.layer.weight.detach()), float(scale), float(skipped)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def train(slopes: list[float]) -> Line:
    """Weight, scale and skipped steps after every step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Line(slopes)
    scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=PATIENCE)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=len(slopes),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[LossScale()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(len(slopes)))))
    return module


def test_an_overflow_costs_the_step_and_halves_the_scale() -> None:
    module = train([8.0, 1.0, 1.0, 8.0, 1.0])  # 8 · 2^14 and 8 · 2^13 are beyond fp16's 65,504, 2^13 is not
    weights, scales, skipped = zip(*module.seen, strict=True)
    assert scales == (2.0**13, 2.0**13, 2.0**13, 2.0**12, 2.0**12)
    assert skipped == (1, 1, 1, 2, 2)
    assert weights == (0.0, -1.0, -2.0, -2.0, -3.0)


def test_the_scale_grows_again_after_steps_without_overflow() -> None:
    module = train([8.0, *[0.5] * (2 * PATIENCE)])
    _, scales, skipped = zip(*module.seen, strict=True)
    assert scales == (2.0**13, 2.0**13, 2.0**13, 2.0**14, 2.0**14, 2.0**14, 2.0**15)
    assert set(skipped) == {1}


def test_gradients_below_the_smallest_fp16_number_survive() -> None:
    assert train([2.0**-30]).seen[0][0] == -(2.0**-30)


def test_skipped_steps_are_counted_on_after_a_resume() -> None:
    before, after = LossScale(), LossScale()
    before.load_state_dict({"skipped": 3})
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == {"skipped": 3}
