"""Random numbers go on after a resume as if never interrupted, in each process; unreadable images are counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from cogview_pl.data.bad_samples import ImageBatch, collate_images
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError
from cogview_pl.lit.callbacks import BadSamples, RandomState
from cogview_pl.lit.data_module import DataModule

from .fitting import Records, loader, trainer


def draw() -> list[float]:
    """Numbers of all three generators; Python makes normal ones in pairs and keeps the second."""
    return [float(torch.rand(())), np.random.rand(), *np.random.randn(2), random.random(), random.gauss(0, 1)]


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


class Draws(LightningModule):
    """Draws numbers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.drawn: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append(draw())
        return self.weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(steps: int, callback: RandomState, start: Path | None, number: int, save: Path | None = None) -> Draws:
    """A run to `steps`, with generators seeded by `number` before it sets them."""
    module, given = Draws(), trainer(steps, callbacks=[callback])
    seed(number)
    given.fit(module, loader([0] * 9), ckpt_path=start, weights_only=True)
    if save:
        given.save_checkpoint(save)
    return module


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    straight = run(7, RandomState(), None, number=1)
    seed(1)
    assert straight.drawn == [draw() for _ in range(7)]  # a fresh run goes on with what there is
    first = run(3, callback := RandomState(), None, number=1, save=file)
    assert first.drawn + run(7, RandomState(), file, number=2).drawn == straight.drawn
    assert first.drawn + run(7, callback, file, number=3).drawn == straight.drawn
    assert run(7, callback, None, number=1).drawn == straight.drawn  # nothing is left of what was restored


def states(count: int) -> list[dict[str, Any]]:
    """Of processes that were seeded with 10, 11, …"""
    found = []
    for number in range(count):
        seed(10 + number)
        (state,) = RandomState().state_dict()["processes"]
        found.append(state)
    return found


def drawn(saved: dict[str, Any] | None, rank: int, world: int, tensor_parallel: bool = False) -> list[float]:
    """First numbers of a process; all of them were seeded with 7 and drew three times in setting up."""
    seed(7)
    callback = RandomState()
    for _ in range(3):
        draw()
    if saved is not None:
        callback.load_state_dict(saved)
    share = None if tensor_parallel else {"rank": rank, "num_replicas": world}
    given: Any = SimpleNamespace(global_rank=rank, world_size=world, distributed_sampler_kwargs=share)
    callback.on_train_start(given, Draws())
    callback.on_train_batch_start(given, Draws(), None, 0)
    found = draw()
    callback.on_train_batch_start(given, Draws(), None, 1)
    assert draw() != found
    return found


def of_seed(number: int) -> list[float]:
    seed(number)
    return draw()


def test_each_process_goes_on_with_its_own_generators() -> None:
    saved = {"processes": states(2)}
    assert [drawn(saved, rank, 2) for rank in (0, 1)] == [of_seed(10), of_seed(11)]
    assert [drawn(saved, rank, 2, tensor_parallel=True) for rank in (0, 1)] == [of_seed(10), of_seed(11)]


def test_another_number_of_processes_takes_the_states_there_are_and_new_ones_for_the_rest() -> None:
    saved = {"processes": states(2)}
    assert drawn(saved, 0, 1) == of_seed(10)
    three = [drawn(saved, rank, 3) for rank in range(3)]
    assert three[:2] == [of_seed(10), of_seed(11)]
    torch.manual_seed(7 + 2)
    assert three[2][0] == float(torch.rand(()))
    one = {"processes": states(1)}
    assert [drawn(one, rank, 2, tensor_parallel=True) for rank in (0, 1)] == [of_seed(10)] * 2  # the same samples


def test_a_checkpoint_of_an_older_version_holds_the_state_of_one_process() -> None:
    assert drawn(states(1)[0], 0, 1) == of_seed(10)


def test_generators_of_gpus_that_are_not_here_are_passed_over() -> None:
    (state,) = states(1)
    elsewhere = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    assert drawn({"processes": [{**state, "cuda": elsewhere}]}, 0, 1) == of_seed(10)


def test_processes_of_a_fresh_run_draw_different_numbers_unless_they_share_samples() -> None:
    found = [drawn(None, rank, 2) for rank in (0, 1)]
    assert found[0] == of_seed(7)  # as one process that has made the same model
    torch.manual_seed(8)
    assert found[1][0] == float(torch.rand(()))
    assert [drawn(None, rank, 2, tensor_parallel=True) for rank in (0, 1)] == [of_seed(7)] * 2


SIZE = 8


class Images(Dataset[Any]):
    """Of which some cannot be read."""

    def __init__(self, name: str, lost: set[int]) -> None:
        self.name = name
        self.lost = lost

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        key = f"{self.name} {index}"
        return Skipped(key, "no image") if index in self.lost else ImageSample(key, torch.zeros(3, 1, 1).byte(), "")


class Counts(Draws):
    """What it trains on does not matter."""

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        pass


def watched(folder: Path, lost: set[int], max_share: float, steps: int = 8) -> Records:
    """A training with batches of 2 and a validation after the fourth step."""
    data = DataModule(
        Images("train", lost), Images("val", {0, 5}), collate=collate_images, batch_size=2, num_workers=0, seed=1
    )
    callback = BadSamples(str(folder / "skipped.jsonl"), max_share)
    given = trainer(steps, callbacks=[callback], val_check_interval=4, check_val_every_n_epoch=None)
    given.fit(Counts(), datamodule=data)
    return given.logger  # type: ignore[return-value]


def test_unreadable_images_are_listed_once_and_counted_in_the_logs(tmp_path: Path) -> None:
    lost = {1, 4, 6}
    counts = watched(tmp_path, lost, max_share=0.5).series("data/skipped")
    order = DataModule(
        Images("", set()), Images("", set()), collate=collate_images, batch_size=2, num_workers=0, seed=1
    )
    met: set[int] = set()
    for step in range(4):
        met |= lost & set(order.samples_of_batch(step))
        assert counts[step] == len(met)
    assert {counts[step] for step in range(4, 8)} == {3 + 2}  # those of the validation too
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    names = [f"train {index}" for index in lost] + ["val 0", "val 5"]
    assert sorted(row["key"] for row in rows) == sorted(names)


def test_too_large_a_share_of_unreadable_images_ends_the_run(tmp_path: Path) -> None:
    """The run ends once it has seen as many samples as the training set has, not before."""
    with pytest.raises(UserError, match="3 of 8 samples cannot be used"):
        watched(tmp_path, {1, 4, 6}, max_share=0.3)


def test_each_process_has_a_list_of_its_own(tmp_path: Path) -> None:
    for rank, name in enumerate(["skipped.jsonl", "skipped_1.jsonl", "skipped_2.jsonl"]):
        data = SimpleNamespace(train=Images("train", set()))
        given: Any = SimpleNamespace(global_rank=rank, datamodule=data)
        callback = BadSamples(str(tmp_path / "skipped.jsonl"), 0.5)
        callback.on_validation_batch_start(given, Counts(), collate_images([Skipped(f"of {rank}", "why")]), 0)
        assert json.loads((tmp_path / name).read_text())["key"] == f"of {rank}"
