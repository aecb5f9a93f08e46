"""Averages of the weights, and which weights become `model/`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped

from .line import Line, carried_out, configured, samples, saved

VALUES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
DECAY = 0.2
EMA = (f"callbacks.ema.decay={DECAY}",)


class Traced(Line):
    """Notes its weight after each step, and at each validation."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.after: list[float] = []
        self.judged: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(self.layer.weight.item())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.judged.append(self.layer.weight.item())


def averages(weights: list[float]) -> list[float]:
    """By the formula, from the initial weight 0."""
    found, average = [], 0.0
    for step, weight in enumerate(weights, start=1):
        decay = min(DECAY, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        found.append(average)
    return found


class Looks(Callback):
    """Uses the model after a validation, as callbacks do that generate images."""

    seen: ClassVar[list[float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Line)
        self.seen.append(pl_module.layer.weight.item())


def test_validations_samples_and_the_model_have_the_averages(run: Path) -> None:
    module = Traced(configured(*EMA, f"+callbacks.looks._target_={__name__}.Looks", max_steps=5))
    Looks.seen.clear()
    metrics = carried_out(module.config, module, samples(*VALUES))
    expected = averages(module.after)
    assert len(module.after) == 5 and abs(expected[-1] - module.after[-1]) > 0.01
    assert module.judged == pytest.approx([expected[1], expected[3], expected[4]])  # the last step is validated too
    assert Looks.seen == module.judged
    assert module.layer.weight.item() == pytest.approx(expected[-1])
    assert metrics["model/step"] == 5
    assert metrics["val/loss"] == pytest.approx((expected[-1] - 3) ** 2)
    checkpoint = saved(run)
    assert checkpoint["state_dict"]["layer.weight"].item() == module.after[-1]  # training goes on from these
    assert checkpoint["averaged_weights"]["layer.weight"].item() == pytest.approx(expected[-1])


def test_batches_that_share_a_step_are_averaged_once(run: Path) -> None:
    module = Traced(configured(*EMA, max_steps=3, accumulate_grad_batches=2))
    carried_out(module.config, module, samples(*VALUES))
    assert module.layer.weight.item() == pytest.approx(averages(module.after[1::2])[-1])


@pytest.mark.parametrize("more", [(), ("callbacks.checkpoint.monitor=val/loss", "model_from=best")])
def test_a_stopped_run_with_averages_goes_on_to_the_bit(run: Path, more: tuple[str, ...]) -> None:
    config = configured(*EMA, *more, max_steps=7)
    whole = Line(config)
    metrics = carried_out(config, whole, samples(*VALUES))
    run.rename("whole")

    for at in (2, 3):  # a validation follows step 4, and none follows step 3
        if run.exists():
            run.rename(f"stopped_{at}")
        config.resume = None
        with pytest.raises(Stopped), SIGNALS:
            carried_out(config, Line(config, at=at, act=lambda: signal.raise_signal(signal.SIGTERM)), samples(*VALUES))
        assert saved(run)["global_step"] == at + 1
        config.resume = str(run)
        second = Line(config)
        with SIGNALS:
            assert carried_out(config, second, samples(*VALUES)) == metrics
        assert torch.equal(second.layer.weight, whole.layer.weight)
        for part in ("state_dict", "averaged_weights"):
            assert torch.equal(saved(run)[part]["layer.weight"], saved(Path("whole"))[part]["layer.weight"])


def test_a_validation_that_fails_leaves_no_averages_in_the_checkpoint(run: Path) -> None:
    class Fails(Traced):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("judge")

    module = Fails(configured(*EMA, "callbacks.checkpoint.every_n_train_steps=5"))
    with pytest.raises(RuntimeError, match="judge"):
        carried_out(module.config, module, samples(*VALUES))
    assert saved(run)["global_step"] == 2
    assert saved(run)["state_dict"]["layer.weight"].item() == module.after[-1]


def test_a_run_does_not_go_on_with_other_averages_or_another_best(run: Path) -> None:
    config = configured(*EMA)
    with pytest.raises(Stopped), SIGNALS:
        carried_out(config, Line(config, at=1, act=lambda: signal.raise_signal(signal.SIGTERM)))
    other = configured()
    other.resume = str(run)
    with pytest.raises(UserError, match=r"callbacks.ema.decay=0.2, this run has null; go on with .*=0.2"):
        carried_out(other, Line(other))
    other = configured(*EMA, "callbacks.checkpoint.monitor=val/loss")
    other.resume = str(run)
    with pytest.raises(UserError, match=r"callbacks.checkpoint.monitor=step, this run has val/loss"):
        carried_out(other, Line(other))


class Overshoots(Traced):
    """Its validation is best after step 6: the target is 3, and each step moves the weight by 0.5."""

    def loss(self, batch: Any) -> Any:
        return -(self.layer(batch)).mean() if self.training else super().loss(batch)


def test_the_model_is_of_the_best_step(run: Path) -> None:
    config = configured("callbacks.checkpoint.monitor=val/loss", "model_from=best", max_steps=7, val_check_interval=1)
    module = Overshoots(config)
    metrics = carried_out(config, module, samples(1.0, 1.0))
    assert module.after[-1] == pytest.approx(3.5) and module.after[5] == pytest.approx(3.0)
    assert module.layer.weight.item() == module.after[5]
    assert metrics["model/step"] == 6 and metrics["model/val/loss"] == pytest.approx(0, abs=1e-9)
    assert metrics["val/loss"] == pytest.approx(0.25, rel=1e-4)  # of the last step
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["last.ckpt", "step_6.ckpt"]


def test_the_model_of_a_run_without_a_choice_is_of_the_last_step(run: Path) -> None:
    config = configured(max_steps=7, val_check_interval=1)
    module = Overshoots(config)
    metrics = carried_out(config, module, samples(1.0, 1.0))
    assert module.layer.weight.item() == module.after[-1]
    assert metrics["model/step"] == 7 and "model/val/loss" not in metrics
