"""Checkpoints of training are models: every task that takes a model takes a `.ckpt`, also of a run that was killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogview_pl import CogView
from cogview_pl.checkpoints.model_hash import model_hash

from .forked import Ended
from .rewound import last_checkpoint

ALL = ("callbacks.checkpoint.every_n_train_steps=3", "callbacks.checkpoint.save_top_k=-1", "logger=none")
LORA = ("task=style", "data.styles=[oil,ink]", "init_from=pretrain", "lora.rank=4")
PROMPT = "左边有一个大的红色圆形"
GENERATE = ("task=generate", f"prompts=[{PROMPT}]", "threads=1")

KILLED = ("adapter", "model", "metrics.json")
"""What a killed run does not have."""


@pytest.fixture(scope="module")
def home(chain, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("checkpoints")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    return home


@pytest.fixture(scope="module")
def ended(cli, home: Path, chain, tiny) -> dict[str, Ended]:
    """All runs of this file that can share a process."""
    tokens = f"data.token_store={chain.run_folder('tokenize')}"
    images = chain.run_folder("vqvae")
    commands: dict[str, tuple[str, ...]] = {
        "vqvae": ("task=vqvae", *tiny, *ALL, "callbacks.ema.decay=0.5"),
        "pretrain": ("task=pretrain", *tiny, *ALL, tokens),
        "best": ("task=pretrain", *tiny, *ALL, tokens, "callbacks.checkpoint.monitor=val/loss", "model_from=best"),
        "style": (*LORA, *tiny, *ALL),
        "finetuned": ("task=pretrain", *tiny, "logger=none", tokens, "init_from=pretrain/checkpoints/step_3.ckpt"),
        "of_model": (*GENERATE, "init_from=pretrain"),
        "of_last": (*GENERATE, "init_from=pretrain/checkpoints/last.ckpt"),
        "of_step_3": (*GENERATE, "init_from=pretrain/checkpoints/step_3.ckpt"),
        "of_merged": (*GENERATE, "init_from=style"),
        "of_lora": (*GENERATE, "init_from=style/checkpoints/last.ckpt"),
        "ranked_and_enlarged": (
            *(*GENERATE, "init_from=pretrain"),
            f"rerank_with={chain.run_folder('caption')}/checkpoints/last.ckpt",
            f"upscale_with={chain.run_folder('super_resolution')}/checkpoints/last.ckpt",
        ),
        "tokens": ("task=tokenize", "data.train_size=8", f"image_tokenizer.path={images}/checkpoints/last.ckpt"),
        "to_sequence_model": ("task=convert", "convert.source=pretrain/checkpoints/last.ckpt", "convert.target=m1"),
        "to_tokenizer": ("task=convert", "convert.source=vqvae/checkpoints/last.ckpt", "convert.target=m2"),
        "to_merged": ("task=convert", "convert.source=style/checkpoints/last.ckpt", "convert.target=m3"),
    }
    found = cli.run_many([([*words, f"run_dir={name}"], home) for name, words in commands.items()], home)
    done = dict(zip(commands, found, strict=True))
    for name, result in done.items():
        assert result.code == 0, (name, result.stderr[-3000:])
    return done


def image(run: Path) -> bytes:
    return (run / "samples" / "0000" / "00.png").read_bytes()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def of_step(run: Path, step: int) -> dict[str, torch.Tensor]:
    saved = torch.load(run / "checkpoints" / f"step_{step}.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): tensor for name, tensor in saved.items()}


def require_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_the_last_checkpoint_generates_what_the_model_generates(ended, home: Path) -> None:
    assert image(home / "of_last") == image(home / "of_model")
    assert image(home / "of_lora") == image(home / "of_merged")
    assert image(home / "of_step_3") != image(home / "of_model")
    by_python = CogView.load(home / "pretrain" / "checkpoints" / "last.ckpt", "cpu").generate(PROMPT)
    assert by_python[0].tobytes() == CogView.load(home / "pretrain", "cpu").generate(PROMPT)[0].tobytes()


def test_a_checkpoint_ranks_and_enlarges(ended, home: Path) -> None:
    sample = json.loads((home / "ranked_and_enlarged" / "samples.jsonl").read_text("utf-8"))
    assert sample["caption_loss"] > 0 and sample["width"] == 128


def test_a_finetune_starts_with_the_weights_of_the_checkpoint(ended, home: Path) -> None:
    """Its first loss is that of the checkpoint, and its record has the hash of the checkpoint's records."""
    metrics = json.loads((home / "finetuned" / "metrics.json").read_text())
    assert metrics["model/step"] == 6
    record = json.loads((home / "finetuned" / ".cogview_pl.json").read_text())
    other = home / "moved.ckpt"
    shutil.copyfile(home / "pretrain" / "checkpoints" / "step_3.ckpt", other)  # another place and time
    assert record["inputs"]["init_from"] == model_hash(other) != model_hash(home / "pretrain" / "checkpoints/last.ckpt")


@pytest.mark.parametrize(("target", "model"), [("m1", "pretrain/model"), ("m2", "vqvae/model"), ("m3", "style/model")])
def test_a_converted_checkpoint_is_the_model(ended, home: Path, target: str, model: str) -> None:
    files = {file.relative_to(home / model) for file in (home / model).rglob("*") if file.is_file()}
    assert len(files) >= 3
    for file in files:
        assert (home / target / file).read_bytes() == (home / model / file).read_bytes(), file


def test_averages_are_the_model_and_not_what_training_goes_on_from(ended, home: Path) -> None:
    """`m2` is converted from a checkpoint of a run with averages."""
    saved = last_checkpoint(home / "vqvae")
    model = weights(home / "m2")
    for name, average in saved["averaged_weights"].items():
        assert torch.equal(model[name.removeprefix("model.")], average)
        assert not torch.equal(saved["state_dict"][name], average)
    buffers = saved["state_dict"].keys() - saved["averaged_weights"].keys()
    assert "model.quantizer.codebook" in buffers
    for name in buffers:
        assert torch.equal(model[name.removeprefix("model.")], saved["state_dict"][name])


def test_the_model_is_of_the_step_that_the_metrics_name(ended, home: Path) -> None:
    metrics = json.loads((home / "best" / "metrics.json").read_text())
    assert metrics["model/step"] in (3, 6)
    require_equal(weights(home / "best" / "model"), of_step(home / "best", int(metrics["model/step"])))
    require_equal(weights(home / "pretrain" / "model"), of_step(home / "pretrain", 6))
    assert metrics["model/val/loss"] <= metrics["val/loss"]


def test_a_killed_run_is_a_model(ended, cli, home: Path, tmp_path: Path) -> None:
    """Its newest checkpoint is used, and a line says so."""
    for name in ("pretrain", "style"):
        shutil.copytree(home / name, home / f"killed_{name}", ignore=shutil.ignore_patterns(*KILLED))
    cases = [
        (*GENERATE, "init_from=killed_pretrain", f"run_dir={tmp_path}/pretrain"),
        (*GENERATE, "init_from=killed_style", f"run_dir={tmp_path}/style"),
    ]
    for (name, expected), result in zip(
        {"pretrain": "of_model", "style": "of_merged"}.items(),
        cli.run_many([(case, home) for case in cases], tmp_path),
        strict=True,
    ):
        assert result.code == 0, result.stderr
        said = f"init_from=killed_{name}: the run has not ended, so its checkpoints/last.ckpt of step 6 is used"
        assert said in result.stdout
        assert image(tmp_path / name) == image(home / expected)


def test_mistakes(ended, cli, home: Path, tiny, tmp_path: Path) -> None:
    def altered(name: str, **changes: object) -> str:
        saved = last_checkpoint(home / "pretrain")
        torch.save({**saved, **changes}, tmp_path / f"{name}.ckpt")
        return str(tmp_path / f"{name}.ckpt")

    entry = last_checkpoint(home / "pretrain")["cogview_pl"]
    earlier = {key: value for key, value in entry.items() if key != "model"}
    wider = {**entry["model"], "config": {**entry["model"]["config"], "transformer": {}}}
    flipped = bytearray((home / "pretrain" / "checkpoints" / "last.ckpt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    (tmp_path / "folder.ckpt").mkdir()
    cases = [
        ((*GENERATE, "init_from=gone.ckpt"), ["init_from=gone.ckpt", "does not exist"]),
        ((*GENERATE, f"init_from={tmp_path}/folder.ckpt"), ["folder.ckpt", "DeepSpeed"]),
        ((*GENERATE, f"init_from={tmp_path}/flipped.ckpt"), ["init_from", "flipped.ckpt"]),
        ((*GENERATE, "init_from=vqvae/checkpoints/last.ckpt"), ["init_from=vqvae", "image_tokenizer", "task=pretrain"]),
        (
            (*GENERATE, f"init_from={altered('foreign', cogview_pl=3)}"),
            ["foreign.ckpt", "no checkpoint of this program"],
        ),
        ((*GENERATE, f"init_from={altered('earlier', cogview_pl=earlier)}"), ["earlier.ckpt", "earlier version"]),
        ((*GENERATE, f"init_from={altered('odd', cogview_pl={**entry, 'model': wider})}"), ["odd.ckpt", "is damaged"]),
        (("task=vqvae", *tiny, "model_from=best"), ["model_from=best", "monitor=step", "monitor=val/loss_recon"]),
        (("task=vqvae", *tiny, "model_from=first"), ["model_from", "first", "last", "best"]),
        (("task=vqvae", *tiny, "callbacks.ema.decay=1"), ["callbacks.ema.decay=1", "below 1"]),
        (("task=pretrain", *tiny, "callbacks.ema.decay=0.9", "strategy=fsdp"), ["callbacks.ema.decay=0.9", "fsdp"]),
    ]
    cli.refuse(cases, home, tmp_path)
