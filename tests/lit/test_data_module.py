"""How samples are dealt out to devices, and where a run on another number of them goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from cogview_pl.data.sampler import ORDER, EndlessSampler
from cogview_pl.data.sequence_dataset import SequenceCollator
from cogview_pl.errors import UserError
from cogview_pl.lit.data_module import DataModule
from cogview_pl.transformer.loss import sequence_loss
from tests.make_models import make_transformer


def module(
    rank: int, world: int, *, batch_size: int, val: int = 9, processed: int = 0, most: int | None = None
) -> DataModule:
    """The state of one device after a number of batches."""
    options: Any = {"batch_size": batch_size, "num_workers": 0, "seed": 0, "max_val_samples": most}
    made = DataModule(range(50), range(val), collate=list, **options)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 4), (3, 2)])
def test_a_validation_measures_a_fixed_number_at_equal_distances(world: int, batch_size: int) -> None:
    """The same samples on any number of devices; never more than there are."""
    for val, most, expected in ((100, 10, range(0, 100, 10)), (7, 3, [0, 2, 4]), (9, 9, range(9)), (9, 50, range(9))):
        made = [module(rank, world, batch_size=batch_size, val=val, most=most) for rank in range(world)]
        dealt = [index for one in made for batch in one.val_dataloader() for index in batch]
        assert sorted(dealt) == list(expected)


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


def test_a_run_keeps_the_order_that_it_began_with() -> None:
    def first(made: DataModule) -> list[list[int]]:
        return list(islice(made.train_dataloader(), 3))

    earlier = module(0, 1, batch_size=4)
    earlier.load_state_dict({"consumed": 8, "batches": 2})  # a checkpoint without a version
    expected = EndlessSampler(50, seed=0, order=1)
    expected.consumed = 8
    assert first(earlier) == [list(islice(expected._from(8 + 4 * number), 4)) for number in range(3)]
    again = module(0, 1, batch_size=4)
    again.load_state_dict(earlier.state_dict() | {"consumed": 8})
    assert first(again) == first(earlier) != first(module(0, 1, batch_size=4))
    assert module(0, 1, batch_size=4).state_dict()["order"] == ORDER
    with pytest.raises(
        UserError, match=r"^resume: the training order of this checkpoint has version 3, known are 1, 2; "
    ):
        again.load_state_dict({"consumed": 8, "batches": 2, "order": 3})


def test_a_batch_of_no_samples_goes_through_the_model_and_counts_nothing() -> None:
    batch: Any = SequenceCollator(pad=5)([])
    model = make_transformer(vocab_size=8, num_layers=1, hidden_size=8, num_heads=2, num_positions=4)
    result = sequence_loss(model, batch.tokens, batch.positions, batch.weights, batch.slots, 2, [range(4), range(4, 8)])
    assert (result.loss.item(), result.weight.item(), result.slot_counts_S.tolist()) == (0.0, 0.0, [0, 0])
    result.loss.backward()


# --- loader processes


class Samples(Dataset[Tensor]):
    """Numbers; reading the seventh has an effect."""

    def __init__(self, at_seven: Callable[[], None]) -> None:
        self.at_seven = at_seven

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        if index == 7:
            self.at_seven()
        return torch.tensor([float(index)])

    def key(self, index: int) -> str:
        return f"sample-{index}"


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += batch[:, 0].tolist()
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(train: Dataset[Any], num_workers: int, **options: Any) -> list[float]:
    """The samples of ten steps, with two validations between."""
    model = Model()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        limit_val_batches=2,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = DataModule(
        train, Samples(do_nothing), collate=torch.stack, batch_size=4, num_workers=num_workers, seed=0, **options
    )  # type: ignore[arg-type]
    trainer.fit(model, datamodule=data)
    return model.seen


def do_nothing() -> None:
    pass


def hang() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise UserError("sample 7 is damaged; copy it again")


workers = pytest.mark.filterwarnings("ignore:.*:UserWarning")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


@workers
@needs_fork
def test_workers_change_neither_samples_nor_their_order() -> None:
    assert fit(Samples(do_nothing), 2, worker_timeout=60) == fit(Samples(do_nothing), 0)


@workers
@needs_fork
@pytest.mark.parametrize(
    ("at_seven", "message"),
    [
        (
            hang,
            r"^data\.num_workers=2: a worker has been reading sample-7 for \d s \(data\.worker_timeout=0\.5\); see ",
        ),
        (die, r"^data\.num_workers=2: a worker has died \(.+\) while it read sample-7; the memory may be full "),
        (refuse, r"^sample 7 is damaged; copy it again$"),
    ],
)
def test_a_worker_that_hangs_dies_or_refuses_ends_training_in_one_line(
    at_seven: Callable[[], None], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        fit(Samples(at_seven), 2, worker_timeout=0.5)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


@workers
@needs_fork
def test_a_stop_is_heard_though_a_worker_hangs() -> None:
    class Stop(SystemExit):
        pass

    def look() -> None:
        raise Stop(143)

    with pytest.raises(Stop):
        fit(Samples(hang), 2, worker_timeout=60, look=look)
