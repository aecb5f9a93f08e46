"""State of a run beyond weights: random generators, and images that could not be read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, enough_to_judge
from cogview_pl.lit.data_module import data_share


class RandomState(Callback):
    """Saves the random generators, so that dropout and codebook revival go on as in a run never interrupted.

    Devices that train on different samples draw different numbers: each has its own state. A run that goes on with
    another number of them takes the states that there are, and new ones for the rest.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []
        self._ready = False
        self._at_first = _generators()  # of one process; strategies for several set the seed anew

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes; all must ask."""
        own = _generators()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"processes": [own]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("processes", [state_dict])  # older ones hold that of one process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set them right before the first step: set-up and sanity checks have drawn numbers of their own."""
        if self._ready:
            return
        self._ready = True
        share, _ = data_share(trainer)
        number = trainer.global_rank if len(self._restored) == trainer.world_size else share
        if number < len(self._restored):
            _set_generators(self._restored[number])
        elif share:  # all processes made the same model, from the same seed
            torch.manual_seed(torch.initial_seed() + share)
        elif trainer.world_size > 1:
            _set_generators(self._at_first)
        self._restored = []


def _generators() -> dict[str, Any]:
    """States of this process."""
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": torch.from_numpy(np.random.get_state(legacy=False)["state"]["key"].astype(np.int64)),
        "numpy_position": int(np.random.get_state(legacy=False)["state"]["pos"]),
    }


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    key = state["numpy"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, state["numpy_position"], 0, 0.0))


class SkippedImages(Callback):
    """Lists images that could not be read in `skipped.jsonl` and stops the run when there are too many.

    Args:
        path: the list.
        max_share: largest share of unreadable images that is put up with.
    """

    def __init__(self, path: str, max_share: float) -> None:
        self._path = Path(path)
        self._max_share = max_share
        self._log: BadSampleLog | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        log = self._note(trainer, batch)
        pl_module.log("data/skipped", float(log.count), sync_dist=trainer.world_size > 1, reduce_fx="sum")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._note(trainer, batch)

    def _note(self, trainer: Trainer, batch: ImageBatch) -> BadSampleLog:
        if self._log is None:
            images = len(trainer.datamodule.train)  # type: ignore[attr-defined]
            self._log = BadSampleLog(
                _of_rank(self._path, trainer.global_rank), self._max_share, enough_to_judge(images)
            )
        self._log.add(batch.skipped, seen=len(batch.images) + len(batch.skipped))
        return self._log


def _of_rank(path: Path, rank: int) -> Path:
    """`skipped.jsonl` of the first process, `skipped_1.jsonl` of the next: they must not write into one file."""
    return path.with_stem(f"{path.stem}_{rank}") if rank else path
