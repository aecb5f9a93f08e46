"""How samples are dealt out to devices, and where a run on another number of them goes on."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from cogview_pl.data.sequences import SequenceCollator
from cogview_pl.lit.data import DataModule
from cogview_pl.transformer import Transformer, sequence_loss


def module(rank: int, world: int, *, batch_size: int, val: int = 9, processed: int = 0) -> DataModule:
    """One device's, after so many batches."""
    made = DataModule(range(50), range(val), collate=list, batch_size=batch_size, num_workers=0, seed=0)  # type: ignore[arg-type]
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        distributed_sampler_kwargs={"rank": rank, "num_replicas": world},
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return made


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_is_named_by_the_samples_that_were_in_it(world: int) -> None:
    """Also in a run that goes on with another batch size on another number of devices."""
    for rank in range(world):
        fresh, resumed = (module(rank, world, batch_size=4) for _ in range(2))
        resumed.load_state_dict({"consumed": 42, "batches": 7})
        for made, first in ((fresh, 0), (resumed, 7)):
            for number, batch in enumerate(islice(made.train_dataloader(), 15), start=first):
                assert made.samples_of_batch(number) == batch


@pytest.mark.parametrize(("val", "world", "batch_size"), [(9, 2, 4), (1, 2, 4), (8, 3, 2), (16, 2, 4)])
def test_validation_samples_once_each_in_equally_many_batches(val: int, world: int, batch_size: int) -> None:
    dealt = [list(module(rank, world, batch_size=batch_size, val=val).val_dataloader()) for rank in range(world)]
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(index for batches in dealt for batch in batches for index in batch) == list(range(val))


def test_another_number_of_devices_goes_on_behind_the_samples_that_were_seen() -> None:
    def first(made: DataModule, count: int) -> list[int]:
        return [index for batch in islice(made.train_dataloader(), count) for index in batch]

    order = first(module(0, 1, batch_size=8), 12)
    state = module(0, 2, batch_size=4, processed=3).state_dict()
    assert state["consumed"] == 24
    alone = module(0, 1, batch_size=8, processed=3)
    alone.load_state_dict(state)
    assert first(alone, 3) == order[24:48]
    later = module(0, 1, batch_size=8, processed=5)
    later.load_state_dict(state)
    assert later.state_dict()["consumed"] == 24 + 2 * 8


def test_a_batch_of_no_samples_goes_through_the_model_and_counts_nothing() -> None:
    batch: Any = SequenceCollator(pad=5)([])
    model = Transformer(vocabulary_size=8, num_layers=1, width=8, num_heads=2, num_positions=4)
    result = sequence_loss(model, batch.tokens, batch.positions, batch.weights, batch.slots, 2, [range(4), range(4, 8)])
    assert (result.loss.item(), result.weight.item(), result.slot_counts_S.tolist()) == (0.0, 0.0, [0, 0])
    result.loss.backward()
