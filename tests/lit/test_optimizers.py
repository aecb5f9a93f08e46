"""The learning rate at every step, which weights decay, and the norm of the gradient in the logs, by value."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.optimizers import (
    ParameterGroup,
    configure_optimizers,
    log_gradient_norm,
    logs_this_step,
    warmup_cosine,
)

from .fitting import fit

HALF = 0.1 + 0.9 / 2  # half way down to 0.1
QUARTER, THREE_QUARTERS = 0.1 + 0.9 * 0.8535533905932737, 0.1 + 0.9 * 0.14644660940672624  # (1 ± cos 45°) / 2


@pytest.mark.parametrize(
    ("max_steps", "warmup", "expected"),
    [
        (12, 1 / 3, [0.25, 0.5, 0.75, 1, 1, None, QUARTER, None, HALF, None, THREE_QUARTERS, None, 0.1, 0.1, 0.1]),
        (10, 0.26, [1 / 3, 2 / 3, 1, 1]),  # rounded to whole steps
        (5, 0.0, [1, 1, QUARTER, HALF, THREE_QUARTERS, 0.1, 0.1]),
        (2, 0.5, [1, 1, 0.1]),  # one step up, one down
        (3, 1.0, [1 / 3, 2 / 3, 1, 1, 0.1]),  # Lightning asks once more after the last step
    ],
)
def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(
    max_steps: int, warmup: float, expected: list[float | None]
) -> None:
    factor = warmup_cosine(max_steps, warmup, final=0.1)
    for step, value in enumerate(expected):
        if value is not None:
            assert factor(step) == pytest.approx(value), step


def test_without_an_end_the_cosine_reaches_zero_and_at_one_it_stays() -> None:
    assert warmup_cosine(9, 0.1, final=0.0)(9) == pytest.approx(0)
    assert [warmup_cosine(9, 0.1, final=1.0)(step) for step in range(10)] == pytest.approx([1] * 10)


class Lines(LightningModule):
    """Two weights; only the first decays. Both have the gradient `gradients[k]` in step k."""

    def __init__(self, gradients: list[float]) -> None:
        super().__init__()
        self.decayed, self.other = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.gradients = gradients

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.decayed + self.other) * self.gradients[batch_idx]

    def configure_optimizers(self) -> Any:
        options = OptimizerConfig(weight_decay=0.2, warmup=0.5, final_lr=0.1)
        groups = [
            ParameterGroup("one", [self.decayed], matrices=True, decay=True),
            ParameterGroup("two", [self.other, self.unused], matrices=False, decay=False),
        ]
        return configure_optimizers(partial(torch.optim.SGD, lr=0.5), options, groups, self.trainer.max_steps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        log_gradient_norm(self)


def test_every_step_is_taken_with_its_learning_rate_and_decay() -> None:
    module = Lines([1.0, 2.0, -1.0, 3.0])
    fit(module, [0] * 4)
    decayed = other = 1.0
    for gradient, factor in zip(module.gradients, [0.5, 1.0, 1.0, HALF], strict=True):
        decayed -= 0.5 * factor * (gradient + 0.2 * decayed)
        other -= 0.5 * factor * gradient
    assert module.decayed.item() == pytest.approx(decayed)
    assert module.other.item() == pytest.approx(other)
    assert module.unused == 1


def test_groups_reach_the_optimizer_with_their_names() -> None:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [ParameterGroup("maps", weights[:1], True, True), ParameterGroup("rest", weights[1:], False, False)]
    options = OptimizerConfig(weight_decay=0.3, warmup=0.0, final_lr=0.0)
    found = configure_optimizers(partial(torch.optim.SGD, lr=1.0), options, groups, 10)["optimizer"].param_groups
    assert [(g["name"], g["matrices"], g["weight_decay"]) for g in found] == [("maps", True, 0.3), ("rest", False, 0.0)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_norm_of_the_gradient_is_logged_at_logging_steps_before_it_is_clipped(accumulate: int) -> None:
    gradients = [1.0, 3.0, -4.0, 2.0, 5.0, 7.0, 1.0, 1.0]
    log = fit(
        Lines([gradient for gradient in gradients for _ in range(accumulate)]),
        [0] * len(gradients) * accumulate,
        every=3,
        max_steps=len(gradients),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.1,
    )
    assert log.series("train/gradient_norm") == pytest.approx({2: 4 * 2**0.5, 5: 7 * 2**0.5})


def test_only_every_so_many_steps_are_logging_steps() -> None:
    steps = [SimpleNamespace(global_step=step, log_every_n_steps=3) for step in range(7)]
    assert [logs_this_step(step) for step in steps] == [False, False, True, False, False, True, False]  # type: ignore[arg-type]
