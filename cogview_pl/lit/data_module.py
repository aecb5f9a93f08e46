"""The LightningDataModule of both stages: any data set, endless training order, exact resume inside an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import Dataset

from cogview_pl.data.loader import Loader
from cogview_pl.data.sampler import ORDER, ORDERS, BatchesInOrder, EndlessSampler, at_equal_distances
from cogview_pl.errors import UserError


def data_share(trainer: Trainer) -> tuple[int, int]:
    """Share of the samples that this process trains on: its number and the number of shares.

    With tensor parallelism all processes train on the same samples, so there is one share.
    """
    shares = trainer.distributed_sampler_kwargs
    return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)


class DataModule(LightningDataModule):
    """Training and validation loaders.

    Training order is a function of (seed, epoch) and never ends. The position in it is a count of samples over all
    devices. Checkpoints hold it, so a run goes on exactly there, also on another number of devices; Lightning alone
    would restart the order. They hold the version of the order too: a run of an earlier version keeps its own.

    Args:
        train, val: map-style data sets.
        collate: samples → batch.
        batch_size: samples per batch and device.
        num_workers: loader processes per device; 0 loads in the training process.
        seed: seed of the training order.
        worker_timeout: seconds without a finished sample after which the run ends; None: no limit.
        look: called while waiting for a loader process; raises when the run was told to stop.
        max_val_samples: largest number of samples that a validation measures; None: all.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any],
        *,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        num_workers: int,
        seed: int,
        worker_timeout: float | None = None,
        look: Callable[[], None] = lambda: None,
        max_val_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.collate = collate
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.worker_timeout = worker_timeout
        self.look = look
        self.max_val_samples = max_val_samples
        self._consumed = self._batches = 0  # before this process: samples of all devices, batches of each
        self._order = ORDER

    @property
    def _world(self) -> tuple[int, int]:
        return data_share(self.trainer) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> Loader[Any]:
        """Endless batches, from where the checkpoint stopped."""
        return self._loader(self.train, sampler=self._order_from(self._consumed), batch_size=self.batch_size)

    def val_dataloader(self) -> Loader[Any]:
        """Each of `val_samples` once. All devices get the same number of batches; the last may be empty."""
        batches = BatchesInOrder(self.val_samples, self.batch_size, *self._world)
        return self._loader(self.val, batch_sampler=batches)

    @property
    def val_samples(self) -> Sequence[int]:
        """Indices into `val` of what a validation measures: all, or the largest number of them at equal distances."""
        return at_equal_distances(len(self.val), self.max_val_samples)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        """Training samples that all devices have processed, batches that each of them has, version of the order."""
        if self.trainer is None:
            return {"consumed": self._consumed, "batches": self._batches, "order": self._order}
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        new = (batches - self._batches) * self.batch_size * self._world[1]
        return {"consumed": self._consumed + new, "batches": batches, "order": self._order}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the samples of the checkpoint, in its order; raises UserError if a later version made it."""
        self._order = state_dict.get("order", 1)  # earlier versions had one
        if self._order not in ORDERS:
            raise UserError(
                f"resume: the training order of this checkpoint has version {self._order}, known are "
                f"{', '.join(map(str, ORDERS))}; go on with the version of cogview_pl that began the run"
            )
        self._consumed = state_dict["consumed"]
        self._batches = state_dict.get("batches", self._consumed // self.batch_size)  # earlier versions: one process

    def samples_of_batch(self, number: int) -> list[int]:
        """Indices into `train` of the samples in this device's training batch `number`, which counts from 0."""
        before = self._consumed + (number - self._batches) * self.batch_size * self._world[1]
        return list(islice(self._order_from(before), self.batch_size))

    def key(self, index: int) -> str:
        """Name of a training sample in messages."""
        return str(self.train.key(index))  # type: ignore[attr-defined]

    def _order_from(self, consumed: int) -> EndlessSampler:
        """This device's training order after `consumed` samples of all devices."""
        rank, world_size = self._world
        size = len(self.train)  # type: ignore[arg-type]
        sampler = EndlessSampler(
            size, self.seed, rank=rank, world_size=world_size, block=self.batch_size, order=self._order
        )
        sampler.consumed = consumed
        return sampler

    def _loader(self, dataset: Dataset[Any], **options: Any) -> Loader[Any]:
        return Loader(
            dataset,
            patience=self.worker_timeout,
            look=self.look,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Loaders draw seeds for their workers. From the global generator this would change dropout, and change it
            # in another way after a resume, when loaders start again.
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )
