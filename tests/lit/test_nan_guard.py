"""Steps without a finite gradient: passed over, counted, and in the end named; checkpoints stay whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from cogview_pl.data.mixing import mixed, sample_key
from cogview_pl.errors import UserError
from cogview_pl.lit.callbacks import NanGuard
from cogview_pl.lit.checkpoint_io import DurableCheckpointIO
from cogview_pl.lit.data import DataModule

SIZE, BATCH = 64, 4


class Numbers(Dataset[Tensor]):
    """Vectors of numbers; those in `bad` hold an infinity."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3,), torch.inf if index in self.bad else index / SIZE)

    def key(self, index: int) -> str:
        return f"number {index}"


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


def data(bad: set[int]) -> DataModule:
    return DataModule(
        Numbers(bad), Numbers(set()), collate=torch.stack, batch_size=BATCH, num_workers=0, seed=1  # type: ignore[arg-type]
    )  # fmt: skip


def fit(folder: Path, model: Model, samples: DataModule, steps: int = 16, accumulate: int = 1) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[
            NanGuard(str(folder), patience=3),
            ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_on_exception=True, save_top_k=0),
        ],
        plugins=[DurableCheckpointIO()],
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bad_steps_in_a_row_end_the_run(tmp_path: Path, accumulate: int) -> None:
    samples = data(set())
    first = 4 * accumulate
    bad = {index for number in range(first, first + 4 * accumulate) for index in samples.samples_of_batch(number)}
    with pytest.raises(UserError) as error:
        fit(tmp_path, Model(), data(bad), accumulate=accumulate, steps=8)
    keys = [f"number {index}" for index in samples.samples_of_batch(first)]
    assert "3 steps in a row" in str(error.value) and "from step 5 on" in str(error.value)
    assert "first bad layer: first;" in str(error.value) and keys[0] in str(error.value)
    found = json.loads((tmp_path / "bad_batch.json").read_text())
    assert found == {"step": 5, "layer": "first", "samples": samples.samples_of_batch(first), "keys": keys}
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_poisoned_weights_replace_no_checkpoint(tmp_path: Path) -> None:
    model = Model()
    fit(tmp_path, model, data(set()), steps=2)
    before = (tmp_path / "last.ckpt").read_bytes()
    model.poison = True
    with pytest.raises(UserError, match="step 1: mean is not finite; no checkpoint of it was written"):
        fit(tmp_path, model, data(set()), steps=3)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_samples_of_mixed_sets_keep_their_names() -> None:
    main, other = Numbers(set()), Subset(Numbers(set()), [7, 9])
    both = mixed(main, other, 0.5)  # type: ignore[arg-type]
    assert isinstance(both, ConcatDataset)
    names = [sample_key(both, index) for index in range(len(both))]
    assert names == [f"number {i}" for i in range(SIZE)] + ["number 7", "number 9"] * (SIZE // 2)
