"""Two processes train, validate and save what one process does with all of their samples."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy

from cogview_pl.data.bad_samples import ImageBatch, collate_images
from cogview_pl.data.samples import Skipped
from cogview_pl.data.sequence_dataset import SequenceBatch
from cogview_pl.lit.callbacks import BadSamples, NanGuard, RandomState
from cogview_pl.lit.data_module import DataModule
from cogview_pl.lit.strategies import FullyShardedStrategy, TensorParallelStrategy
from cogview_pl.transformer.parallel import full

from .fitting import loader, trainer
from .models import discriminated, images, sequence_batch, sequence_module, tokenizer_module

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

CLIP = 0.3
DDP = partial(DDPStrategy, find_unused_parameters=True)  # of the discriminator before its start
SEQUENCES = [sequence_batch(seed, 4, 4, 5) for seed in (1, 2, 3)]
IMAGES = [images(1, 3), images(2, 2), [], images(3, 4)]
SHARES = [(1, 2), (0, 2), (0, 0), (3, 1)]  # of these, per process


def sequences(rank: int | None) -> list[SequenceBatch]:
    """The first process has one row of a batch and the second three; None: all in one."""
    rows = {None: slice(None), 0: slice(0, 1), 1: slice(1, 4)}[rank]
    return [SequenceBatch(*(tensor[rows] for tensor in given)) for given in SEQUENCES]


def image_batches(rank: int | None) -> list[ImageBatch]:
    """In the second batch the first process has no image, in the third none has."""
    found = []
    for samples, (first, _) in zip(IMAGES, SHARES, strict=True):
        mine: Any = {None: samples, 0: samples[:first], 1: samples[first:]}[rank]
        found.append(collate_images([*mine, Skipped(f"lost by {rank}", "why")]))
    return found


def adversarial_module() -> LightningModule:
    return tokenizer_module("ema", adversarial=discriminated(start=1))


def trained(module: LightningModule, batches: list[Any], **options: Any) -> dict[str, Any]:
    """Full weights after a training, its log, and the number of elements of each weight in this process."""
    given = trainer(len(batches), gradient_clip_val=CLIP, **options)
    given.fit(module, loader(batches))
    log = {step: {name: float(value) for name, value in row.items()} for step, row in given.logger.rows.items()}  # type: ignore[union-attr]
    weights = {name: full(value.detach(), True) for name, value in module.state_dict().items()}
    parts = {name: getattr(value, "_local_tensor", value).numel() for name, value in module.state_dict().items()}
    return {"weights": weights, "log": log, "parts": parts}


def validated(module: LightningModule, batches: list[Any], **options: Any) -> dict[str, float]:
    (found,) = trainer(1, **options).validate(module, loader(batches), verbose=False)
    return dict(found)


def skipped(folder: str, **options: Any) -> float:
    """Number of unreadable images in the log after two steps, which read all 8 samples."""
    samples: Any = [*images(1, 5), *(Skipped(f"lost {number}", "why") for number in range(3))]
    data = DataModule(samples, samples, collate=collate_images, batch_size=2, num_workers=0, seed=1)
    given = trainer(2, callbacks=[BadSamples(f"{folder}/skipped.jsonl", 1.0)], limit_val_batches=0, **options)
    given.fit(tokenizer_module("ema"), datamodule=data)
    return given.logger.series("data/skipped")[1]  # type: ignore[union-attr]


def left_by_the_guard(rank: int) -> bool:
    """Whether a finite gradient of the first process is dropped because that of the second is not."""
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf if rank else 1.0)
    given: Any = SimpleNamespace(world_size=2, precision_plugin=None)
    NanGuard("", 3).on_before_optimizer_step(given, module, optimizer)  # type: ignore[arg-type]
    return any(parameter.grad is not None for parameter in module.parameters())


def run_rank(rank: int, folder: str) -> None:
    """All of it in one pair of processes: starting them takes longest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does
    two: dict[str, Any] = {"devices": 2}
    found = {
        "ddp": trained(sequence_module(), sequences(rank), strategy="ddp", **two),
        "fsdp": trained(sequence_module(), sequences(rank), strategy=FullyShardedStrategy(), **two),
        "tp": trained(sequence_module(), sequences(None), strategy=TensorParallelStrategy(), **two),
        "tokenizer": trained(
            tokenizer_module("ema", quantize_after_steps=1), image_batches(rank), strategy="ddp", **two
        ),
        "adversarial": trained(adversarial_module(), image_batches(rank), strategy=DDP(), **two),
        "sequence validation": validated(sequence_module(), sequences(rank), strategy="ddp", **two),
        "tokenizer validation": validated(tokenizer_module(), image_batches(rank), strategy="ddp", **two),
        "skipped": skipped(folder, strategy="ddp", **two),
        "guard": left_by_the_guard(rank),
    }
    torch.manual_seed(20 + rank)
    found["random"] = [state["torch"] for state in RandomState().state_dict()["processes"]]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def require_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5)
    assert found["log"].keys() == expected["log"].keys()
    for step, row in expected["log"].items():
        assert found["log"][step] == pytest.approx(row, rel=1e-3), step


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp"])
def test_sequences_are_trained_on_as_one_batch(ranks: list[dict[str, Any]], strategy: str) -> None:
    """With unequal weights and rows in the two processes, and clipped gradients."""
    require_same(ranks[0][strategy], trained(sequence_module(), sequences(None)))


@pytest.mark.parametrize(("strategy", "table", "matrix"), [("ddp", 1, 1), ("fsdp", 2, 2), ("tp", 1, 2)])
def test_each_process_holds_its_part(ranks: list[dict[str, Any]], strategy: str, table: int, matrix: int) -> None:
    """Sharded weights are divided all, tensor parallel ones inside the blocks."""
    for found in (ranks[rank][strategy] for rank in (0, 1)):
        for name, parts in (("token_embedding", table), ("blocks.0.attention.qkv", matrix)):
            whole_numbers = ranks[0]["ddp"]["weights"][f"model.{name}.weight"].numel()
            assert found["parts"][f"model.{name}.weight"] == pytest.approx(whole_numbers / parts, rel=0.05)


def test_images_are_trained_on_as_one_batch(ranks: list[dict[str, Any]]) -> None:
    """Where one process has none, and where both have none."""
    require_same(ranks[0]["tokenizer"], trained(tokenizer_module("ema", quantize_after_steps=1), image_batches(None)))


def test_a_discriminator_is_trained_as_on_one_batch(ranks: list[dict[str, Any]]) -> None:
    """The adaptive weight and the averages of the logits are those of the joined batch; it starts in step 2."""
    require_same(ranks[0]["adversarial"], trained(adversarial_module(), image_batches(None)))


def test_validation_figures_are_those_of_all_samples(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["sequence validation"] == pytest.approx(validated(sequence_module(), sequences(None)), rel=1e-5)
    assert ranks[0]["tokenizer validation"] == pytest.approx(
        validated(tokenizer_module(), image_batches(None)), rel=1e-4
    )


def test_unreadable_images_are_counted_over_all_processes(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["skipped"] == 3


def test_a_gradient_that_is_bad_in_one_process_counts_nowhere(ranks: list[dict[str, Any]]) -> None:
    assert [found["guard"] for found in ranks] == [False, False]


def test_random_states_of_all_processes_are_saved(ranks: list[dict[str, Any]]) -> None:
    expected = [torch.Generator().manual_seed(20 + rank).get_state() for rank in (0, 1)]
    for found in ranks:
        assert all(torch.equal(state, wanted) for state, wanted in zip(found["random"], expected, strict=True))
