"""Steps without a finite gradient: passed over, counted, and in the end named; checkpoints stay whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import Dataset

from cogview_pl.data.mixing import mixed
from cogview_pl.errors import UserError
from cogview_pl.lit.callbacks import NanGuard
from cogview_pl.lit.callbacks.nan_guard import first_bad_layer
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.lit.data_module import DataModule

SIZE, BATCH = 128, 4


class Numbers(Dataset[Tensor]):
    """Vectors of numbers; those in `bad` hold an infinity."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3,), torch.inf if index in self.bad else index / SIZE)

    def key(self, index: int) -> str:
        return f"数字 {index}"


class Model(LightningModule):
    """Two layers and a counter that sees every batch; `poison` makes it NaN."""

    def __init__(self, poison: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.poison = poison

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.poison:
            self.mean += batch.mean(0) * torch.nan
        return self.second(self.first(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data(bad: set[int], batch: int = BATCH) -> DataModule:
    return DataModule(
        Numbers(bad), Numbers(set()), collate=torch.stack, batch_size=batch, num_workers=0, seed=1  # type: ignore[arg-type]
    )  # fmt: skip


def fit(
    folder: Path,
    model: Model,
    samples: DataModule,
    steps: int = 16,
    accumulate: int = 1,
    every: int = 1,
    guard: NanGuard | None = None,
    plugins: tuple[Any, ...] = (),
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[
            guard or NanGuard(str(folder), patience=3),
            ModelCheckpoint(folder, every_n_train_steps=every, save_last=True, save_on_exception=True, save_top_k=0),
        ],
        plugins=[DurableCheckpointIO(), *plugins],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=-1,
    )
    trainer.fit(model, datamodule=samples)
    return trainer


def test_a_bad_step_changes_nothing(tmp_path: Path) -> None:
    """Weights after a run are those of the good batches alone."""
    samples = data(set())
    bad = samples.samples_of_batch(5)
    model = Model()
    trainer = fit(tmp_path, model, data({bad[0]}))
    assert trainer.callback_metrics["train/bad_steps"] == 1
    reference = Model()
    optimizer = reference.configure_optimizers()
    for number in range(16):
        batch = torch.stack([samples.train[index] for index in samples.samples_of_batch(number)])
        if number != 5:
            optimizer.zero_grad()
            reference.training_step(batch, number).backward()
            optimizer.step()
    for ours, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 4), (3, 5)])
def test_bad_steps_in_a_row_end_the_run(tmp_path: Path, accumulate: int, batch: int) -> None:
    """The first of them is named, four of its samples in the message, and no checkpoint is written any more."""
    samples = data(set(), batch)
    first = 4 * accumulate
    bad = {index for number in range(first, first + 4 * accumulate) for index in samples.samples_of_batch(number)}
    with pytest.raises(UserError) as error:
        fit(tmp_path, Model(), data(bad, batch), accumulate=accumulate, steps=8, every=3)
    keys = [f"数字 {index}" for index in samples.samples_of_batch(first)]
    assert "3 steps in a row" in str(error.value) and "from step 5 on" in str(error.value)
    assert error.value.overrides == ("optimizer.optimizer.lr=0.001",)  # a tenth, for the command that goes on
    some = ", ".join(keys[:4]) + (", …" if batch > 4 else "")
    assert f"first bad layer: first; samples of that batch: {some} (all in " in str(error.value)
    text = (tmp_path / "bad_batch.json").read_text()
    assert json.loads(text) == {"step": 5, "layer": "first", "samples": samples.samples_of_batch(first), "keys": keys}
    assert keys[0] in text
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_a_loss_scaler_has_sixteen_steps_more_to_find_its_scale(tmp_path: Path) -> None:
    for steps in (18, 19):
        samples = data(set(range(SIZE)))
        plugins = (MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")),)
        if steps == 18:
            trainer = fit(tmp_path, Model(), samples, steps=steps, plugins=plugins)
            assert trainer.callback_metrics["train/bad_steps"] == 18
        else:
            with pytest.raises(UserError, match="19 steps in a row had no finite gradient, from step 1 on"):
                fit(tmp_path, Model(), samples, steps=steps, plugins=plugins)


def test_bad_steps_are_counted_on_after_a_resume(tmp_path: Path) -> None:
    order = data(set())
    first, second = NanGuard(str(tmp_path), patience=3), NanGuard(str(tmp_path), patience=3)
    assert first.state_dict() == {"bad_steps": 0}
    fit(tmp_path, Model(), data({order.samples_of_batch(1)[0], order.samples_of_batch(2)[0]}), steps=4, guard=first)
    assert first.state_dict() == {"bad_steps": 2}
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"bad_steps": 2}
    trainer = fit(tmp_path, Model(), data({order.samples_of_batch(0)[0]}), steps=4, guard=second)
    assert trainer.callback_metrics["train/bad_steps"] == 3
    assert second.state_dict() == {"bad_steps": 3}


def test_poisoned_weights_replace_no_checkpoint(tmp_path: Path) -> None:
    model = Model()
    fit(tmp_path, model, data(set()), steps=2)
    before = (tmp_path / "last.ckpt").read_bytes()
    model.poison = True
    with pytest.raises(UserError, match="step 1: mean is not finite; no checkpoint of it was written"):
        fit(tmp_path, model, data(set()), steps=3)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_weights_of_whole_numbers_are_saved(tmp_path: Path) -> None:
    model = Model()
    model.register_buffer("seen", torch.tensor(7))
    fit(tmp_path, model, data(set()), steps=1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["seen"] == 7


class Pair(nn.Module):
    """Gives whole numbers, and the given ones from the second on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, str]:
        return torch.zeros(2, dtype=torch.long), x, "words"


class Suspect(LightningModule):
    """A training step that goes wrong in a way of its own; it logs, and moves a buffer, as others do."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(1))
        self.inner = nn.Sequential(nn.Linear(3, 3), Pair())
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(3, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.fault = fault
        self.logged = 0

    def log(self, *arguments: Any, **options: Any) -> None:
        self.logged += 1

    log_dict = log

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.steps += 1
        self.log("loss", batch.sum())
        self.log_dict({"other": batch.sum()})
        if self.fault == "module":
            self.inner[0].weight.data[0, 0] = torch.nan
        if self.fault == "pair":
            batch = self.inner[1](batch * torch.inf)[1]
        loss = self.last(self.inner(batch)[1]).square().mean()
        if self.fault == "loss":
            return loss + torch.inf
        if self.fault == "gradient":
            return loss + (self.scale * 0).sqrt().sum()  # 0 · ∞
        return None if self.fault == "no loss" else loss


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("module", "inner.0"),
        ("pair", "inner.1"),
        ("loss", "the loss"),
        ("gradient", "the gradient of scale"),
        ("no loss", "none"),
        ("nothing", "none"),
    ],
)
def test_the_first_bad_layer_is_named_and_the_module_left_as_it_was(fault: str, found: str) -> None:
    module = Suspect(fault)
    assert first_bad_layer(module, torch.ones(2, 3)) == found
    assert module.steps == 0
    assert all(not child._forward_hooks for child in module.modules())
    assert module.logged == 0
    module.log("loss", 1.0)
    module.log_dict({})
    assert module.logged == 2
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_bad_gradient_counts_as_zero() -> None:
    model = nn.Linear(2, 1, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer: Any = SimpleNamespace(world_size=1, precision_plugin=None)
    for value, expected in ((3.0, 3.0), (torch.inf, 0.0)):
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.full_like(model.bias, value)
        NanGuard("", patience=3).on_before_optimizer_step(trainer, model, optimizer)  # type: ignore[arg-type]
        assert model.bias.grad.tolist() == [expected]
        assert model.weight.grad.tolist() == [[float(value == 3)] * 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_bad_steps_are_read_every_so_many_steps() -> None:
    """Batches 0, 1 and 2 make the first step; with a patience of 3 the third step is looked at."""
    guard, logged = NanGuard("", patience=3), {}
    model = nn.Linear(2, 1, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer: Any = SimpleNamespace(world_size=1, precision_plugin=None, accumulate_grad_batches=3)
    for number in range(20):
        module: Any = SimpleNamespace(log=lambda name, value, number=number: logged.update({number: value}))
        if number % 3 == 2:
            model.weight.grad = torch.full_like(model.weight, torch.inf if number in (2, 5, 11) else 1.0)
            guard.on_before_optimizer_step(trainer, module, optimizer)
        guard.on_train_batch_end(trainer, module, None, None, number)
    assert logged == {8: 2, 17: 3}


def test_samples_of_mixed_sets_keep_their_names() -> None:
    both: Any = mixed(Numbers(set()), Numbers(set()), 0.75)
    names = [both.key(index) for index in range(len(both))]
    assert names == [f"数字 {i}" for i in range(SIZE)] * 4
