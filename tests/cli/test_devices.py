"""Several processes train as one does, write one folder, and can be gone on with by another number of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.ddp

STEPS, HALF = 10, 5
TRAIN = (
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={HALF}",
    f"callbacks.checkpoint.every_n_train_steps={HALF}",
    "callbacks.checkpoint.save_top_k=-1",
    "trainer.log_every_n_steps=1",
    "data.val_size=9",  # not the same number for both
    "threads=1",
    "~callbacks.progress",
)
VQVAE = (
    "task=vqvae",
    *TRAIN,
    "data.train_size=96",
    "image_tokenizer.continuous_steps=2",
    "image_tokenizer.num_codes=32",
    "image_tokenizer.quantizer.kmeans_iters=2",
    "image_tokenizer.quantizer.decay=0.5",
    "image_tokenizer.quantizer.revive_every=2",
    "image_tokenizer.quantizer.dead_threshold=0.4",
)
ONE = ("data.batch_size=8",)
TWO = ("data.batch_size=4", "trainer.devices=2")
DDP, FSDP = (*TWO, "strategy=ddp"), (*TWO, "strategy=fsdp")
TP = ("data.batch_size=8", "trainer.devices=2", "strategy=tp")  # both train on the same samples


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def pretrain(chain) -> tuple[str, ...]:
    return ("task=pretrain", *TRAIN, f"data.store={chain.run_folder('tokenize')}", "~callbacks.samples")


@pytest.fixture(scope="module")
def on_two(cli, home, pretrain, tmp_path_factory) -> Path:
    """Runs of two processes, in a folder each; those that end in `_again` went on from the middle of another."""
    cases = [
        ([*VQVAE, *DDP, "run_dir=vqvae_ddp"], home),
        ([*pretrain, *DDP, "run_dir=ddp"], home),
        ([*pretrain, *FSDP, "run_dir=fsdp"], home),
        ([*pretrain, *TP, "run_dir=tp"], home),
    ]
    require_done(cli.run_on_two(cases, tmp_path_factory.mktemp("two")))
    cases = [([*pretrain, *FSDP, f"resume={middle_of(home / 'fsdp', 'fsdp_again')}"], home)]
    require_done(cli.run_on_two(cases, tmp_path_factory.mktemp("two_again")))
    return home


@pytest.fixture(scope="module")
def on_one(cli, home, on_two, pretrain, tmp_path_factory) -> Path:
    """The same in one process, and runs that went on in one from the middle of one in two."""
    cases = [
        ([*VQVAE, *ONE, "run_dir=vqvae_one"], home),
        ([*pretrain, *ONE, "run_dir=one"], home),
        ([*pretrain, *ONE, f"resume={middle_of(home / 'ddp', 'ddp_on_one')}"], home),
        ([*pretrain, *ONE, f"resume={middle_of(home / 'fsdp', 'fsdp_on_one')}"], home),
    ]
    require_done(cli.run_many(cases, tmp_path_factory.mktemp("one")))
    return home


def require_done(ended: list[Any]) -> None:
    for result in ended:
        assert result.code == 0, result.stderr[-4000:]


def middle_of(run: Path, name: str) -> Path:
    """A copy of a run as it was at half its steps."""
    copy = run.with_name(name)
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / f"step_{HALF}.ckpt", copy / "checkpoints" / "last.ckpt")
    return copy


def curve(run: Path, tag: str) -> dict[int, float]:
    """Step → value."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "weights.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_two_processes_train_stage_2_as_one_does(kind: str, on_one: Path) -> None:
    for tag in ("train/loss", "train/loss_text", "train/loss_image", "val/loss"):
        one, two = curve(on_one / "one", tag), curve(on_one / kind, tag)
        assert len(one) == (2 if tag == "val/loss" else STEPS)
        assert two == pytest.approx(one, abs=1e-5)
    assert curve(on_one / kind, "train/gradient_norm") == pytest.approx(
        curve(on_one / "one", "train/gradient_norm"), rel=1e-5
    )
    torch.testing.assert_close(weights(on_one / kind), weights(on_one / "one"), atol=1e-4, rtol=0)


def test_two_processes_train_stage_1_as_one_does(on_one: Path) -> None:
    assert sum(curve(on_one / "vqvae_one", "codebook/revived").values()) > 0
    for tag in ("train/loss", "train/loss_reconstruction", "train/loss_commitment", "codebook/revived"):
        assert curve(on_one / "vqvae_ddp", tag) == pytest.approx(curve(on_one / "vqvae_one", tag), abs=1e-5)
    codebooks = [weights(on_one / run)["quantizer.codebook"] for run in ("vqvae_one", "vqvae_ddp")]
    torch.testing.assert_close(*codebooks, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("run", "whole"), [("fsdp_again", "fsdp"), ("fsdp_on_one", "fsdp"), ("ddp_on_one", "ddp")])
def test_saved_on_two_goes_on(run: str, whole: str, on_one: Path) -> None:
    for tag in ("train/loss", "val/loss"):
        expected = {step: value for step, value in curve(on_one / whole, tag).items() if step >= HALF}
        assert curve(on_one / run, tag) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(weights(on_one / run), weights(on_one / whole), atol=1e-4, rtol=0)
    consumed = {folder: last_checkpoint(on_one / folder)["DataModule"]["consumed"] for folder in (run, whole, "one")}
    assert consumed == dict.fromkeys(consumed, 8 * STEPS)


def last_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"step_{STEPS}.ckpt", map_location="cpu", weights_only=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_checkpoints_of_two_processes_are_those_of_one(kind: str, on_one: Path) -> None:
    one, two = last_checkpoint(on_one / "one"), last_checkpoint(on_one / kind)
    torch.testing.assert_close(two["state_dict"], one["state_dict"], atol=1e-4, rtol=0)
    states = one["optimizer_states"][0]["state"], two["optimizer_states"][0]["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        torch.testing.assert_close(states[1][number]["exp_avg"], state["exp_avg"], atol=1e-5, rtol=1e-3)


def test_one_folder_written_once(on_two: Path) -> None:
    names = {path.name for path in on_two.iterdir()}
    assert {"vqvae_ddp", "ddp", "fsdp", "tp"} <= names
    assert not (on_two / "outputs").exists()
    for run in ("ddp", "fsdp", "tp"):
        assert len(list((on_two / run / "tensorboard").glob("events.*"))) == 1
        assert json.loads((on_two / run / "metrics.json").read_text())["val/loss"] > 0
