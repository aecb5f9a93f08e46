"""State of a run besides its weights: random generators, and samples that could not be read."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from cogview_pl.data.bad_samples import BadSampleLog, ImageBatch, enough_to_judge
from cogview_pl.data.mended import MendedLog
from cogview_pl.data.samples import CaptionedImages, Skipped
from cogview_pl.lit.data_module import data_share

_log = logging.getLogger(__name__)


class RandomState(Callback):
    """Saves the random generators, so that a resumed run draws the same numbers as a run without interruption.

    Devices that train on different samples draw different numbers, so each has its own state. A run that goes on with
    more devices makes new states for the additional ones.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []
        self._ready = False
        self._at_first = _generators()  # the state of one process; strategies for several set the seed again

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes; all processes must call this."""
        own = _generators()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"processes": [own]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, own)
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("processes", [state_dict])  # earlier versions saved one process

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ready = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the states right before the first step, because the set-up draws numbers too."""
        if self._ready:
            return
        self._ready = True
        share, _ = data_share(trainer)
        number = trainer.global_rank if len(self._restored) == trainer.world_size else share
        if number < len(self._restored):
            _set_generators(self._restored[number])
        elif share:  # all processes had the same seed, for the same initial weights
            torch.manual_seed(torch.initial_seed() + share)
        elif trainer.world_size > 1:
            _set_generators(self._at_first)
        self._restored = []


def _generators() -> dict[str, Any]:
    """States of this process's random generators."""
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


class BadSamples(Callback):
    """Lists samples that could not be read in `skipped.jsonl`, and ends the run if there are too many.

    Images that were mended when they were decoded are listed in `mended.jsonl` in the same folder.

    Args:
        path: path of the list.
        max_share: largest share of unreadable samples that does not end the run.
    """

    def __init__(self, path: str, max_share: float) -> None:
        self._path = Path(path)
        self._max_share = max_share
        self._log: BadSampleLog | None = None
        self._mended: MendedLog | None = None
        self._validation = _Seen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """List what is known to be bad before any image is read."""
        if trainer.global_rank:
            return
        log = self._list(trainer)
        sets = [trainer.datamodule.train, trainer.datamodule.val]  # type: ignore[attr-defined]
        for images in sets:
            if isinstance(images, CaptionedImages):
                log.note(images.known_bad())
        log.require_few(sum(map(len, sets)))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        log = self._list(trainer)
        log.add(batch.skipped, batch.seen)
        self._note_remarks(trainer, batch)
        pl_module.log("data/skipped", float(log.count), sync_dist=trainer.world_size > 1, reduce_fx="sum")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation = _Seen()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._list(trainer).note(batch.skipped)
        self._note_remarks(trainer, batch)
        self._validation.skipped += batch.skipped
        self._validation.samples += batch.seen

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the validation as a whole: its samples come in order, and bad ones may all come first."""
        if not trainer.sanity_checking:
            self._list(trainer).add(self._validation.skipped, self._validation.samples)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._mended is not None and self._mended.count:
            _log.info("%s", self._mended.summary())

    def _list(self, trainer: Trainer) -> BadSampleLog:
        if self._log is None:
            images = len(trainer.datamodule.train)  # type: ignore[attr-defined]
            self._log = BadSampleLog(
                _of_rank(self._path, trainer.global_rank), self._max_share, enough_to_judge(images)
            )
        return self._log

    def _note_remarks(self, trainer: Trainer, batch: ImageBatch) -> None:
        if self._mended is None:
            self._mended = MendedLog(_of_rank(self._path.with_name("mended.jsonl"), trainer.global_rank))
        self._mended.add(batch.remarks)


@dataclass
class _Seen:
    """Samples of a validation."""

    samples: int = 0
    skipped: list[Skipped] = field(default_factory=list)


def _of_rank(path: Path, rank: int) -> Path:
    """A file for each process: `skipped.jsonl` for the first, `skipped_1.jsonl` for the next."""
    return path.with_stem(f"{path.stem}_{rank}") if rank else path
