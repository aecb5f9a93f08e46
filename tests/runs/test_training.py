"""A training run in its folder: steps, validations, checkpoints and errors."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cogview_pl.assembly.trainer import optimizer_factory, seed_all
from cogview_pl.config.parts import training_options
from cogview_pl.data.loader import Loader
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.lit.data_module import DataModule
from cogview_pl.runs.record import RunRecord

from .line import INPUTS, Line, Numbers, carried_out, configured, plain, saved


def test_a_run_returns_what_was_logged_last_and_leaves_a_checkpoint(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every sample is 1, so the gradient of (w - 3)² is clipped to -1, and w is 0, ½, 1, 1½, 2."""
    config = configured()
    seed_all(config.seed)
    module = Line(config)
    capfd.readouterr()
    metrics = carried_out(config, module)
    assert capfd.readouterr() == ("", "")  # without a progress bar
    assert module.layer.weight.item() == pytest.approx(2.0, abs=1e-5)
    losses = {"train/loss": pytest.approx(2.25, abs=1e-4), "val/loss": pytest.approx(1.0, abs=1e-4)}
    assert metrics == {**losses, "model/step": 4.0}
    assert all(type(value) is float for value in metrics.values())
    assert module.seen == [1.0] * 4
    checkpoint = saved(run)
    assert checkpoint["global_step"] == 4
    assert checkpoint["cogview_pl"]["kind"] == "line" and checkpoint["cogview_pl"]["inputs"] == INPUTS
    assert checkpoint["cogview_pl"]["metrics"].keys() == losses.keys()
    assert not (run / "tensorboard").exists() and not (run / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("steps", "interval", "accumulate", "wanted"),
    [(4, 2, 1, [2, 4]), (4, 2, 2, [2, 4]), (5, 2, 1, [2, 4, 5]), (3, 2, 2, [2, 3]), (3, 500, 1, [3]), (3, 500, 2, [3])],
)
def test_validations_come_every_so_many_steps_and_at_the_end(
    run: Path, steps: int, interval: int, accumulate: int, wanted: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(max_steps=steps, val_check_interval=interval, accumulate_grad_batches=accumulate)
    seed_all(config.seed)
    module = Line(config)
    carried_out(config, module)
    assert capfd.readouterr() == ("", "")  # neither tables nor advice of Lightning
    assert module.validated == wanted
    assert len(module.seen) == steps * accumulate


def test_what_must_not_change_is_noted_when_training_begins(run: Path) -> None:
    config = configured(max_steps=1)
    config.seed, config.template.loss["text"] = 7, 0.25
    carried_out(config, Line(config))
    record = RunRecord.load(run)
    assert record.inputs == INPUTS
    assert record.settings == {
        "seed": 7,
        "optimizer.optimizer._target_": "torch.optim.SGD",
        "template.layout": "[ROI1] {text} [BASE] [BOI1] {image:8x8} [EOI1]",
        "template.loss": {"text": 0.25, "image": 1.0},
        "sequences.replay_share": 0.0,
        "sequences.conditioning_dropout": 0.0,
        "sequences.token_noise": 0.0,
        "callbacks.checkpoint.monitor": "step",
        "callbacks.ema.decay": None,
    }


def test_progress_in_a_file_is_lines_of_steps_and_losses(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(max_steps=2)
    config.callbacks["progress"] = {
        "_target_": "cogview_pl.lit.progress.TrainingBar",
        "terminal_seconds": 0,
        "file_seconds": 0,
    }
    with caplog.at_level("INFO"):
        carried_out(config, Line(config))
    lines = [message for message in caplog.messages if message.startswith("train: ")]
    assert [line.rpartition(",")[0] for line in lines] == [
        "train: 1 of 2 steps, loss 9.000",
        "train: 2 of 2 steps, loss 6.250",
    ]


# --- failures


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_an_error_in_a_step_is_no_fault_of_the_checkpoint(run: Path) -> None:
    config = configured()
    error = ValueError("a fault of ours")

    def fault() -> None:
        try:
            raise KeyError("on the way")
        except KeyError:
            raise error  # noqa: B904, as code does that fails in an except block

    with pytest.raises(ValueError) as raised:
        carried_out(config, Line(config, at=2, act=fault))
    assert raised.value is error
    config.resume = str(run)
    with pytest.raises(ValueError) as raised:
        carried_out(config, Line(config, at=0, act=fault))
    assert raised.value is error


def test_a_full_disk_under_the_logs_is_one_line(run: Path) -> None:
    config = configured()
    full = fail(OSError(28, "No space left on device"))
    with pytest.raises(UserError, match=rf"^{run}/tensorboard: no space left on the disk"):
        carried_out(config, Line(config, at=1, act=full))


def test_the_error_of_a_loader_that_cannot_start_is_not_hidden(run: Path) -> None:
    class Broken(Loader[Any]):
        def __iter__(self) -> Any:
            raise UserError("no memory for a worker")

    class BrokenData(DataModule):
        def train_dataloader(self) -> Loader[Any]:
            return Broken(self.train, patience=None, look=lambda: None)

    config = configured()
    data = BrokenData(Numbers(1.0), Numbers(1.0), collate=torch.stack, batch_size=1, num_workers=0, seed=0)
    with pytest.raises(UserError, match=r"^no memory for a worker$"):
        carried_out(config, Line(config), data)


@pytest.mark.parametrize(
    ("group", "key", "value", "words"),
    [
        ("trainer", "surprise", 1, "unexpected keyword argument 'surprise'"),
        ("trainer", "devices", 0, "`Trainer\\(devices=0\\)` value is not a valid input"),
        ("precision", "precision", "7-bit", "Precision '7-bit' is invalid"),
        ("trainer", "limit_val_batches", -3.0, "invalid value"),
    ],
)
def test_what_lightning_does_not_take_is_one_line(run: Path, group: str, key: str, value: object, words: str) -> None:
    config = configured()
    getattr(config, group)[key] = value
    with pytest.raises(UserError, match=rf"^trainer, precision or strategy: .*{words}"):
        carried_out(config, Line(config))


def test_a_node_that_the_run_does_not_have_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    config = configured()
    with pytest.raises(UserError, match=r"^NODE_RANK=1 is set, and the run has trainer\.num_nodes=1"):
        carried_out(config, Line(config))
    del config.trainer["num_nodes"]
    with pytest.raises(UserError, match=r"^NODE_RANK=1 is set, and the run has trainer\.num_nodes=1"):
        carried_out(config, Line(config))


def test_heads_that_devices_cannot_divide_are_refused(run: Path) -> None:
    config = configured("strategy=tp", "trainer.devices=2")
    config.model.num_heads = 3
    SIGNALS.received = signal.SIGTERM  # if it is not refused, still no process is started for the second device
    with pytest.raises(UserError, match=r"^strategy=tp: model\.num_heads=3 cannot be divided among 2 devices"):
        carried_out(config, Line(config))


# --- preparation of both stages


def test_the_optimizer_is_the_one_that_is_configured() -> None:
    config = plain()
    optimizer = optimizer_factory(training_options(config))([nn.Parameter(torch.ones(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 4e-4 and tuple(optimizer.defaults["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("change", "words"), [({"speed": 3}, ".*'speed'"), ({"lr": -1.0}, "Invalid learning rate: -1.0")]
)
def test_an_optimizer_that_cannot_be_made_is_refused(change: dict[str, object], words: str) -> None:
    config = configured()
    config.optimizer.optimizer |= change
    with pytest.raises(UserError, match=rf"^optimizer\.optimizer: {words}; see conf/optimizer/$"):
        optimizer_factory(training_options(config))


def test_a_seed_decides_all_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(number: int) -> tuple[float, float, float]:
        config = configured()
        config.seed = number
        seed_all(config.seed)
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    assert drawn(3) == drawn(3)
    assert all(one != other for one, other in zip(drawn(3), drawn(4), strict=True))
    assert os.environ["PL_SEED_WORKERS"] == "1"  # loader processes derive their random numbers from it


def test_lightning_does_not_remark_on_what_was_chosen(capfd: pytest.CaptureFixture[str]) -> None:
    chosen = [
        "The 'train_dataloader' does not have many workers which may be a bottleneck.",
        "Checkpoint directory /run/checkpoints exists and is not empty.",
        "`isinstance(treespec, LeafSpec)` is deprecated",
        "To copy construct from a tensor, it is recommended to use sourceTensor.clone()",
        "It is recommended to use `self.log('val/loss', ..., sync_dist=True)` when logging on epoch level",
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seed_all(configured().seed)
        for words in (*chosen, "the disk is nearly full"):
            warnings.warn(words, stacklevel=1)
    assert [str(warning.message) for warning in said] == ["the disk is nearly full"]
    for name in ("lightning.pytorch", "lightning.fabric"):
        assert logging.getLogger(f"{name}.any").getEffectiveLevel() == logging.WARNING
    assert capfd.readouterr() == ("", "")
