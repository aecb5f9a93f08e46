"""The learning rate at every step, which weights decay, and the norm of the gradient in the logs, by value."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn

from cogview_pl.errors import UserError
from cogview_pl.lit.config import OptimizerConfig
from cogview_pl.lit.muon import Muon
from cogview_pl.lit.optimizers import (
    ParameterGroup,
    configure_optimizers,
    log_gradient_norm,
    logs_this_step,
)
from cogview_pl.lit.schedule import warmup_cosine

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


def test_a_schedule_that_starts_later_warms_up_from_the_rate_at_which_the_run_had_ended() -> None:
    factor = warmup_cosine(20, 0.5, final=0.1, start=12)
    assert [factor(step) for step in (0, 11)] == [0.1, 0.1]
    rise = [0.1 + 0.9 * share for share in (0.25, 0.5, 0.75, 1)]
    assert [factor(step) for step in range(12, 16)] == pytest.approx(rise)
    assert [factor(step) for step in (16, 17, 18, 20, 30)] == pytest.approx([1, QUARTER, HALF, 0.1, 0.1])


def schedule_of(decay: float) -> OptimizerConfig:
    return OptimizerConfig(weight_decay=decay, warmup=0.2, final_lr=0.1)


def built(options: OptimizerConfig, build: Any, steps: int = 10) -> tuple[Any, Any]:
    """An optimizer of two weights, and its schedule."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(2, 2)) for _ in range(2)]
    groups = [ParameterGroup("maps", weights[:1], True, True), ParameterGroup("rest", weights[1:], False, False)]
    found = configure_optimizers(build, options, groups, steps)
    return found["optimizer"], found["lr_scheduler"]["scheduler"]


def trained(optimizer: Any, schedule: Any, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = weight.detach().clone()
        optimizer.step()
        schedule.step()


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "AdamW": (
        torch.optim.AdamW,
        {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8},
        {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6},
    ),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "momentum": 0.5}),
    "Muon": (
        partial(Muon, fused=False),
        {"lr": 0.1, "matrix_lr": 0.2, "momentum": 0.9, "betas": (0.9, 0.98), "eps": 1e-8},
        {"lr": 0.01, "matrix_lr": 0.03, "momentum": 0.5, "betas": (0.8, 0.99), "eps": 1e-6},
    ),
    "a rate that is a tensor": (
        lambda groups, lr: torch.optim.SGD(groups, lr=torch.tensor(lr)),
        {"lr": 0.1},
        {"lr": 0.01},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_has_the_configured_hyperparameters_at_the_saved_step(name: str) -> None:
    """As if it had been built with them and had taken the same number of steps; its state is the saved one."""
    build, before, now = OPTIMIZERS[name]
    old, new = schedule_of(0.1), OptimizerConfig(weight_decay=0.3, warmup=0.5, final_lr=0.2, schedule_steps=20)
    optimizer, schedule = built(old, partial(build, **before))
    trained(optimizer, schedule, 4)
    states = optimizer.state_dict(), schedule.state_dict()
    for options, arguments in ((old, before), (new, now)):
        restored, restored_schedule = built(options, partial(build, **arguments))
        restored.load_state_dict(states[0])
        restored_schedule.load_state_dict(states[1])
        whole, whole_schedule = built(options, partial(build, **arguments))
        trained(whole, whole_schedule, 4)
        assert options_of(restored) == options_of(whole)
        assert restored_schedule.state_dict() == whole_schedule.state_dict()
        assert restored_schedule.get_last_lr() == whole_schedule.get_last_lr()
        for one, other in zip(optimizer.state.values(), restored.state.values(), strict=True):
            assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_a_switch_that_needs_another_state_is_refused_when_a_state_is_loaded() -> None:
    options = schedule_of(0.1)
    optimizer, schedule = built(options, partial(torch.optim.AdamW, lr=0.1, amsgrad=False, fused=False))
    trained(optimizer, schedule, 1)
    other, _ = built(options, partial(torch.optim.AdamW, lr=0.1, amsgrad=True, fused=True))
    with pytest.raises(UserError, match=r"^resume: optimizer\.optimizer\.amsgrad was False and is True, and the check"):
        other.load_state_dict(optimizer.state_dict())
    fused, _ = built(options, partial(torch.optim.AdamW, lr=0.1, amsgrad=False, fused=True))
    fused.load_state_dict(optimizer.state_dict())
    assert all(group["fused"] for group in fused.param_groups)


@pytest.mark.parametrize(("kind", "refused"), [(torch.optim.RMSprop, True), (torch.optim.SGD, False)])
def test_momentum_that_was_zero_needs_a_state(kind: type[torch.optim.Optimizer], refused: bool) -> None:
    """RMSprop would end with a KeyError; SGD begins with the next gradient."""
    options = schedule_of(0.1)
    optimizer, schedule = built(options, partial(kind, lr=0.1, momentum=0))
    trained(optimizer, schedule, 1)
    other, other_schedule = built(options, partial(kind, lr=0.1, momentum=0.9))
    if refused:
        with pytest.raises(
            UserError, match=r"^resume: optimizer\.optimizer\.momentum was 0 and is 0\.9, and the check"
        ):
            other.load_state_dict(optimizer.state_dict())
    else:
        other.load_state_dict(optimizer.state_dict())
        trained(other, other_schedule, 2)
        assert all(group["momentum"] == 0.9 for group in other.param_groups)
        assert all(state["momentum_buffer"].any() for state in other.state.values())


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
