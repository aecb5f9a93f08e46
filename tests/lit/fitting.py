"""A short training on a CPU on given batches, and its log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from cogview_pl.lit.checkpoint_io import DurableCheckpointIO


class Records(Logger):
    """Keeps what a run logs: `rows[step][name]`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "records"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.setdefault(step or 0, {}).update(metrics)

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Not kept."""

    def series(self, name: str) -> dict[int, float]:
        """The steps at which a metric was written, and its values."""
        return {step: row[name] for step, row in self.rows.items() if name in row}


def loader(batches: Sequence[Any]) -> DataLoader[Any]:
    """The batches as they are; draws no random numbers."""
    return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]


def trainer(steps: int, every: int = 1, **options: Any) -> Trainer:
    """A trainer on the CPU that logs every `every` steps to `Records`."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "log_every_n_steps": every,
        "logger": Records(),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "plugins": [DurableCheckpointIO()],
    }
    return Trainer(**settings | options)


def fit(module: LightningModule, batches: Sequence[Any], every: int = 1, **options: Any) -> Records:
    """One step for each batch; the log."""
    given = trainer(len(batches), every, **options)
    given.fit(module, loader(batches))
    assert isinstance(given.logger, Records)
    return given.logger


def validate(module: LightningModule, batches: Iterable[Any]) -> dict[str, float]:
    """Metrics of a validation on these batches."""
    (found,) = trainer(1).validate(module, loader(list(batches)), verbose=False)
    return dict(found)
