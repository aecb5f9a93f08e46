"""Several processes train like one process, write one folder, and resume with another number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogview_pl.runs.record import RECORD

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

STEPS, HALF = 10, 5
TRAIN = (
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={HALF}",
    f"callbacks.checkpoint.every_n_train_steps={HALF}",
    "callbacks.checkpoint.save_top_k=-1",
    "trainer.log_every_n_steps=1",
    "data.val_size=9",  # processes have different numbers of samples
    "threads=1",
    "plan.strict=false",
    "~callbacks.progress",
)
VQVAE = (
    "task=vqvae",
    *TRAIN,
    "data.train_size=96",
    "image_tokenizer.quantize_after_steps=2",
    "image_tokenizer.codebook_size=32",
    "image_tokenizer.quantizer.kmeans_iters=2",
    "image_tokenizer.quantizer.decay=0.5",
    "image_tokenizer.quantizer.revive_every=2",
    "image_tokenizer.quantizer.dead_threshold=0.4",
)
ONE = ("data.batch_size=8", "trainer.devices=1", "strategy=single")  # a resumed run would keep its devices
TWO = ("data.batch_size=4", "trainer.devices=2")
DDP, FSDP = (*TWO, "strategy=ddp"), (*TWO, "strategy=fsdp")
GENERATE = ("task=generate", "prompts=[红色的圆形,蓝色的心形]", "num_images_per_prompt=2", "seed=7", "threads=1")
TP = ("data.batch_size=8", "trainer.devices=2", "strategy=tp")  # both processes train on the same samples


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def pretrain(chain) -> tuple[str, ...]:
    return ("task=pretrain", *TRAIN, f"data.token_store={chain.run_folder('tokenize')}", "~callbacks.samples")


@pytest.fixture(scope="module")
def lora(chain) -> tuple[str, ...]:
    base = f"init_from={chain.run_folder('pretrain')}"
    store = f"data.token_store={chain.run_folder('tokenize')}"
    return ("task=caption", *TRAIN, store, base, "lora.rank=4", "lora.targets=[qkv,down,tokens]")


@pytest.fixture(scope="module")
def on_two(cli, home, pretrain, tmp_path_factory) -> Path:
    """Runs of two processes, each in its own folder."""
    cases = [
        ([*VQVAE, *DDP, "run_dir=vqvae_ddp"], home),
        ([*pretrain, *DDP, "run_dir=ddp"], home),
        ([*pretrain, *FSDP, "run_dir=fsdp"], home),
        ([*pretrain, *ONE, "run_dir=refused"], home),
    ]
    *done, refused = cli.run_on_two(cases, tmp_path_factory.mktemp("two"))
    require_done(done)
    assert refused.code == 2 and "2 processes were started" in refused.stderr
    return home


@pytest.fixture(scope="module")
def more_on_two(cli, on_two, pretrain, lora, chain, tmp_path_factory) -> Path:
    """Slower runs: tensor parallelism, adapters, and runs that were resumed in two processes."""
    again = [middle_of(on_two / run, f"{run}_again") for run in ("ddp", "fsdp")]
    generator = f"init_from={chain.run_folder('pretrain')}"
    cases = [
        ([*pretrain, *DDP, f"resume={again[0]}"], on_two),
        ([*pretrain, *FSDP, f"resume={again[1]}"], on_two),
        ([*pretrain, *TP, "run_dir=tp"], on_two),
        ([*lora, *DDP, "run_dir=lora_ddp"], on_two),
        ([*GENERATE, generator, "strategy=tp", "trainer.devices=2", "run_dir=generated_tp"], on_two),
    ]
    require_done(cli.run_on_two(cases, tmp_path_factory.mktemp("two_again")))
    alone = [
        ([*GENERATE, generator, "run_dir=generated_one"], on_two),
        ([*lora, *ONE, "run_dir=lora_one"], on_two),
    ]
    require_done(cli.run_many(alone, tmp_path_factory.mktemp("one_again")))
    return on_two


@pytest.fixture(scope="module")
def on_one(cli, home, on_two, pretrain, tmp_path_factory) -> Path:
    """The same runs in one process, and runs of two processes that were resumed in one."""
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
    """A copy of a run, reduced to its state after half of its steps."""
    copy = run.with_name(name)
    (copy / "checkpoints").mkdir(parents=True)
    for file in (RECORD, "config.yaml"):
        shutil.copy(run / file, copy / file)
    shutil.copy(run / "checkpoints" / f"step_{HALF}.ckpt", copy / "checkpoints" / "last.ckpt")
    return copy


def curve(run: Path, tag: str) -> dict[int, float]:
    """Step → value."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "weights.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_stage_2_as_one_does(kind: str, on_one: Path) -> None:
    require_same_training(on_one / kind, on_one / "one")


@pytest.mark.slow
def test_tensor_parallel_trains_as_one_process_does(more_on_two: Path, on_one: Path) -> None:
    require_same_training(more_on_two / "tp", on_one / "one")


@pytest.mark.slow
def test_tensor_parallel_generates_the_same_images(more_on_two: Path) -> None:
    one, two = more_on_two / "generated_one", more_on_two / "generated_tp"
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    for image in (one / "samples").rglob("*.png"):
        assert image.read_bytes() == (two / image.relative_to(one)).read_bytes()


@pytest.mark.slow
def test_two_processes_train_adapters_as_one_does(more_on_two: Path) -> None:
    several, one = more_on_two / "lora_ddp", more_on_two / "lora_one"
    require_same_training(several, one, slots=("text",))
    adapters = [load_file(run / "adapter" / "adapter.safetensors") for run in (several, one)]
    torch.testing.assert_close(*adapters, atol=1e-4, rtol=0)


def require_same_training(several: Path, one: Path, slots: tuple[str, ...] = ("text", "image")) -> None:
    """Curves, gradients, weights and optimizer states."""
    for tag in ("train/loss", *(f"train/loss_{slot}" for slot in slots), "val/loss"):
        expected = curve(one, tag)
        assert len(expected) == (2 if tag == "val/loss" else STEPS)
        assert curve(several, tag) == pytest.approx(expected, abs=1e-5)
    assert curve(several, "watch-train/gradient_norm") == pytest.approx(
        curve(one, "watch-train/gradient_norm"), rel=1e-4
    )
    torch.testing.assert_close(weights(several), weights(one), atol=1e-4, rtol=0)
    found, wanted = last_checkpoint(several), last_checkpoint(one)
    torch.testing.assert_close(found["state_dict"], wanted["state_dict"], atol=1e-4, rtol=0)
    states = found["optimizer_states"][0]["state"], wanted["optimizer_states"][0]["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[1].items():
        torch.testing.assert_close(states[0][number]["exp_avg"], state["exp_avg"], atol=1e-5, rtol=1e-3)


def test_two_processes_train_stage_1_as_one_does(on_one: Path) -> None:
    assert sum(curve(on_one / "vqvae_one", "watch-codebook/revived").values()) > 0
    for tag in ("train/loss", "train/loss_reconstruction", "train/loss_commitment", "watch-codebook/revived"):
        assert curve(on_one / "vqvae_ddp", tag) == pytest.approx(curve(on_one / "vqvae_one", tag), abs=1e-5)
    one, several = (weights(on_one / run)["quantizer.codebook"] for run in ("vqvae_one", "vqvae_ddp"))
    torch.testing.assert_close(one, several, atol=1e-3, rtol=0)
    # After rounding a vector half-way between two codes may belong to either; then the means of these two differ.
    assert ((one - several).abs().amax(0) > 1e-4).sum() <= 4


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_saved_on_two_goes_on_with_one(kind: str, on_one: Path) -> None:
    require_same_second_half(on_one / f"{kind}_on_one", on_one / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_saved_on_two_goes_on_with_two(kind: str, more_on_two: Path) -> None:
    require_same_second_half(more_on_two / f"{kind}_again", more_on_two / kind)


def require_same_second_half(resumed: Path, whole: Path) -> None:
    """Curves, weights and the position in the data."""
    for tag in ("train/loss", "val/loss"):
        expected = {step: value for step, value in curve(whole, tag).items() if step >= HALF}
        assert curve(resumed, tag) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(weights(resumed), weights(whole), atol=1e-4, rtol=0)
    for run in (resumed, whole):
        assert last_checkpoint(run)["DataModule"]["consumed"] == 8 * STEPS


def last_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"step_{STEPS}.ckpt", map_location="cpu", weights_only=True)


def test_one_folder_written_once(on_two: Path) -> None:
    assert {path.name for path in on_two.iterdir()} >= {"vqvae_ddp", "ddp", "fsdp"}
    assert not (on_two / "outputs").exists() and not (on_two / "refused").exists()
    for run in ("ddp", "fsdp"):
        assert len(list((on_two / run / "tensorboard").glob("events.*"))) == 1
        assert json.loads((on_two / run / "metrics.json").read_text())["val/loss"] > 0
