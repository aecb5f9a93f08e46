"""The smallest training run: it fits the slope of a line, with the configuration that the command line composes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from cogview_pl.assembly.options import sequence_settings
from cogview_pl.assembly.trainer import optimizer_factory, train
from cogview_pl.config.parts import training_options
from cogview_pl.config.schema import Config
from cogview_pl.lit.data_module import DataModule
from cogview_pl.lit.optimizers import ParameterGroup, configure_optimizers
from cogview_pl.runs.run_folder import RunFolder
from tests.composed import composed

IDENTITY: dict[str, Any] = {"kind": "line", "settings": {"weights": 1}}
INPUTS = {"data": "aa"}
WITHOUT = ("reconstructions", "bad_samples", "throughput", "loss_scale", "nan_guard", "progress")
SGD = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}


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


def plain() -> Config:
    """The composed configuration; tests may change it."""
    return deepcopy(_composed())


def configured(*overrides: str, **trainer: object) -> Config:
    """Four steps of SGD with learning rate 0.5 and gradients clipped to 1; `trainer` has other arguments."""
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
    """One weight, initially 0. Before batch number `at` of this process it calls a function."""

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
        build = optimizer_factory(training_options(self.config))
        return configure_optimizers(build, self.config.optimizer, [group], self.config.trainer["max_steps"])


def samples(*values: float) -> DataModule:
    return DataModule(Numbers(*values), Numbers(1.0), collate=torch.stack, batch_size=1, num_workers=0, seed=0)


def carried_out(
    config: Config, module: LightningModule, data: DataModule | None = None, inputs: dict[str, str] = INPUTS
) -> dict[str, float]:
    """Train like a task."""
    folder = RunFolder(Path(str(config.run_dir)), None, goes_on=bool(config.resume))
    folder.describe(OmegaConf.create({"task": config.task, "seed": config.seed}))
    return train(
        training_options(config),
        folder,
        module,
        data or samples(1.0),
        identity=dict(IDENTITY),
        settings=sequence_settings(config.template, config.sequences),
        inputs=dict(inputs),
        num_heads=config.model.num_heads,
    )


def saved(run: Path) -> dict[str, Any]:
    """The checkpoint to resume from."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
