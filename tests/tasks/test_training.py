"""What a training run does in its folder: steps, validations, checkpoints, going on, stopping, and what it refuses."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from cogview_pl.config import Config
from cogview_pl.data.workers import Loader
from cogview_pl.errors import UserError
from cogview_pl.lit.data import DataModule
from cogview_pl.lit.optim import ParameterGroup, configure_optimizers
from cogview_pl.stopping import STOP, Stopped
from cogview_pl.tasks.run_folder import RunFolder
from cogview_pl.tasks.run_record import RunRecord
from cogview_pl.tasks.training import optimizer_factory, seed, train
from tests.composed import composed

IDENTITY: dict[str, Any] = {"kind": "line", "settings": {"weights": 1}}
INPUTS = {"data": "aa"}
WITHOUT = ("reconstructions", "skips", "throughput", "loss_scale", "nan_guard", "progress")
SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, from the folder that it was started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(STOP, "received", None)  # and what a test leaves there is put back
    monkeypatch.setattr(STOP, "deferred", False)
    return Path("run")


@cache
def _composed(*overrides: str) -> Config:
    return composed(
        "task=vqvae",
        "run_dir=run",
        "trainer.accelerator=cpu",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "callbacks.checkpoint.every_n_train_steps=1",
        "logger=none",
        "optimizer.warmup=0",
        "optimizer.final_lr=1",
        *(f"~callbacks.{name}" for name in WITHOUT),
        *overrides,
    )


def configured(*overrides: str, **trainer: object) -> Config:
    """Four steps of SGD with a learning rate of 0.5, gradients clipped to 1, but for other arguments of the Trainer."""
    config = deepcopy(_composed(*overrides))
    config.optimizer.optimizer = dict(SGD)
    config.trainer |= trainer
    return config


class Numbers(Dataset[Tensor]):
    """Samples x of the line y = 3 x."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([self.values[index]])


class Line(LightningModule):
    """One weight, which begins at 0. Before batch `at`, counted in this process, it does something."""

    def __init__(
        self, config: Config, at: int = -1, act: Callable[[], object] = lambda: None, outputs: int = 1
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(1, outputs, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.config = config
        self.at, self.act = at, act
        self.seen: list[float] = []
        self.validated: list[int] = []

    def loss(self, batch: Tensor) -> Tensor:
        return (self.layer(batch) - 3 * batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(self.seen) == self.at:
            self.act()
        self.seen += batch.flatten().tolist()
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(self.trainer.global_step)
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        group = ParameterGroup("line", list(self.parameters()), matrices=True, decay=False)
        return configure_optimizers(optimizer_factory(self.config), [group], self.config.trainer["max_steps"])


def samples(*values: float) -> DataModule:
    return DataModule(Numbers(*values), Numbers(1.0), collate=torch.stack, batch_size=1, num_workers=0, seed=0)


def carried_out(
    config: Config, module: LightningModule, data: DataModule | None = None, inputs: dict[str, str] = INPUTS
) -> dict[str, float]:
    """What a task does around it."""
    folder = RunFolder(Path(str(config.run_dir)), None, goes_on=bool(config.resume))
    folder.describe(OmegaConf.create({"task": config.task, "seed": config.seed}))
    return train(config, folder, module, data or samples(1.0), dict(IDENTITY), dict(inputs))


def saved(run: Path) -> dict[str, Any]:
    """The checkpoint to go on from."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


# --- steps


def test_a_run_returns_what_was_logged_last_and_leaves_a_checkpoint(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every sample is 1, so that the gradient of (w - 3)² is clipped to -1, and w goes 0, ½, 1, 1½, 2."""
    config = configured()
    seed(config)
    module = Line(config)
    capfd.readouterr()
    metrics = carried_out(config, module)
    assert capfd.readouterr() == ("", "")  # without a progress bar
    assert module.layer.weight.item() == pytest.approx(2.0, abs=1e-5)
    assert metrics == {"train/loss": pytest.approx(2.25, abs=1e-4), "val/loss": pytest.approx(1.0, abs=1e-4)}
    assert all(type(value) is float for value in metrics.values())
    assert module.seen == [1.0] * 4
    checkpoint = saved(run)
    assert checkpoint["global_step"] == 4
    assert checkpoint["cogview_pl"]["kind"] == "line" and checkpoint["cogview_pl"]["inputs"] == INPUTS
    assert checkpoint["cogview_pl"]["metrics"].keys() == metrics.keys()
    assert not (run / "tensorboard").exists() and not (run / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("steps", "interval", "accumulate", "wanted"),
    [(4, 2, 1, [2, 4]), (4, 2, 2, [2, 4]), (5, 2, 1, [2, 4, 5]), (3, 2, 2, [2, 3]), (3, 500, 1, [3]), (3, 500, 2, [3])],
)
def test_validations_come_every_so_many_steps_and_at_the_end(
    run: Path, steps: int, interval: int, accumulate: int, wanted: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    config = configured(max_steps=steps, val_check_interval=interval, accumulate_grad_batches=accumulate)
    seed(config)
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
        "sequences.mix_share": 0.0,
        "sequences.conditioning_dropout": 0.0,
        "sequences.target_noise": 0.0,
    }


def test_the_learning_rate_is_logged_where_there_is_a_logger(run: Path) -> None:
    config = configured("logger=tensorboard", log_every_n_steps=1, max_steps=1)
    carried_out(config, Line(config))
    assert any(b"lr-SGD" in events.read_bytes() for events in (run / "tensorboard").glob("events.*"))


def test_a_progress_bar_is_shown_where_it_is_asked_for(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = configured(max_steps=1)
    config.callbacks["progress"] = {"_target_": "lightning.pytorch.callbacks.TQDMProgressBar"}
    carried_out(config, Line(config))
    assert "Epoch 0" in capfd.readouterr().out


# --- going on


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run: Path) -> None:
    """To the same weight over the same samples, and with the same metrics."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    config = configured(max_steps=6, accumulate_grad_batches=2)
    whole = Line(config)
    metrics = carried_out(config, whole, samples(*values))
    run.rename("whole")

    first = Line(config, at=4, act=lambda: signal.raise_signal(signal.SIGINT))  # in the first half of step 3
    with pytest.raises(Stopped) as stopped, STOP:
        carried_out(config, first, samples(*values))
    assert stopped.value.code == 130
    assert saved(run)["global_step"] == 3
    config.resume = str(run)
    second = Line(config)
    with STOP:  # forgets the signal, as another process has never heard it
        assert carried_out(config, second, samples(*values)) == metrics
    assert first.seen + second.seen == whole.seen and len(first.seen) == 6
    assert torch.equal(second.layer.weight, whole.layer.weight)

    again = Line(config)  # nothing is left to do but to validate
    assert carried_out(config, again, samples(*values)) == metrics
    assert (again.seen, again.validated) == ([], [6])


def test_a_stop_on_another_device_ends_this_process_too(run: Path) -> None:
    """Lightning raises the same in all of them; the one that got no signal ends as by SIGTERM."""
    config = configured()

    def told() -> None:
        raise SIGTERMException

    with pytest.raises(Stopped) as stopped:
        carried_out(config, Line(config, at=1, act=told))
    assert stopped.value.code == 143


def test_a_signal_before_the_first_step_is_heard(run: Path) -> None:
    config = configured()
    module = Line(config)
    with pytest.raises(Stopped), STOP:
        signal.raise_signal(signal.SIGTERM)
        carried_out(config, module)
    assert module.seen == [] and not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 1, "seed=0, this run has 1"),
        (
            "optimizer.optimizer",
            {**SGD, "_target_": "torch.optim.Adam"},
            "=torch.optim.SGD, this run has torch",
        ),
        ("template.loss", {"text": 0.0}, r"template\.loss=\{.*\}, this run has \{'text': 0\.0\}"),
        ("sequences.mix_share", 0.5, r"sequences\.mix_share=0\.0, this run has 0\.5"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(run: Path, key: str, value: object, words: str) -> None:
    config = configured(max_steps=1)
    carried_out(config, Line(config))
    record = (run / ".cogview_pl.json").read_bytes()
    config.resume = str(run)
    group, _, name = key.rpartition(".")
    setattr(getattr(config, group) if group else config, name, value)
    with pytest.raises(UserError, match=rf"^resume: {run} was begun with .*{words}"):
        carried_out(config, Line(config))
    assert (run / ".cogview_pl.json").read_bytes() == record


def test_a_run_does_not_go_on_with_other_data_but_unverified(run: Path) -> None:
    config = configured()
    carried_out(config, Line(config))
    config.resume = str(run)
    with pytest.raises(UserError, match=r"^resume: data is not what it was when .*verify=false"):
        carried_out(config, Line(config), inputs={"data": "bb"})
    config.verify = False
    carried_out(config, Line(config), inputs={"data": "bb"})
    assert RunRecord.load(run).inputs == {"data": "bb"}


def refuse(error: BaseException) -> Callable[[object], None]:
    def hook(checkpoint: object) -> None:
        raise error

    return hook


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(run: Path) -> None:
    config = configured(max_steps=1)
    carried_out(config, Line(config))
    config.resume = str(run)
    with pytest.raises(UserError) as refused:
        carried_out(config, Line(config, outputs=2))
    assert str(refused.value).startswith(f"resume: {run}/checkpoints/last.ckpt does not fit this run (Error(s) in")
    assert str(refused.value).endswith("; go on from another checkpoint, or start anew")
    assert "size mismatch for layer.weight" in str(refused.value) and "\n" not in str(refused.value)
    module = Line(config)
    module.on_load_checkpoint = refuse(ValueError())  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"does not fit this run \(ValueError\)"):
        carried_out(config, module)
    for error in (UserError("ours"), FileNotFoundError("gone")):
        module.on_load_checkpoint = refuse(error)  # type: ignore[method-assign]
        with pytest.raises(type(error)) as raised:
            carried_out(config, module)
        assert raised.value is error


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
    with pytest.raises(UserError, match=r"^strategy=tp: model\.num_heads=3 cannot be divided among 2 devices"):
        carried_out(config, Line(config))


# --- what both stages prepare


def test_the_optimizer_is_the_one_that_is_configured() -> None:
    config = deepcopy(_composed())
    config.optimizer.weight_decay, config.optimizer.warmup, config.optimizer.final_lr = 0.3, 0.2, 0.1
    factory = optimizer_factory(config)
    assert (factory.weight_decay, factory.warmup, factory.final_lr) == (0.3, 0.2, 0.1)
    optimizer = factory.build([nn.Parameter(torch.ones(2))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 4e-4 and tuple(optimizer.defaults["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("change", "words"), [({"speed": 3}, ".*'speed'"), ({"lr": -1.0}, "Invalid learning rate: -1.0")]
)
def test_an_optimizer_that_cannot_be_made_is_refused(change: dict[str, object], words: str) -> None:
    config = configured()
    config.optimizer.optimizer |= change
    with pytest.raises(UserError, match=rf"^optimizer\.optimizer: {words}; see conf/optimizer/$"):
        optimizer_factory(config)


def test_a_seed_decides_all_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(number: int) -> tuple[float, float, float]:
        config = configured()
        config.seed = number
        seed(config)
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    assert drawn(3) == drawn(3)
    assert all(one != other for one, other in zip(drawn(3), drawn(4), strict=True))
    assert os.environ["PL_SEED_WORKERS"] == "1"  # loader processes draw their own numbers from it


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
        seed(configured())
        for words in (*chosen, "the disk is nearly full"):
            warnings.warn(words, stacklevel=1)
    assert [str(warning.message) for warning in said] == ["the disk is nearly full"]
    for name in ("lightning.pytorch", "lightning.fabric"):
        assert logging.getLogger(f"{name}.any").getEffectiveLevel() == logging.WARNING
    assert capfd.readouterr() == ("", "")
