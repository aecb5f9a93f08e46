"""Keys that follow from the weights of a run: taken from released files and from folders, never typed again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from cogview_pl.cli.overrides import quote_override
from cogview_pl.config.from_weights import take_from_weights
from cogview_pl.errors import UserError
from cogview_pl.runs.run_folder import new_run

from ..checkpoints.saved import save_run, save_tokenizer
from ..composed import composition
from ..released_files import make_release

HEADS = "model.num_heads=2"  # of stand-ins only: the heads of the published size are known


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("released") / "weights", num_positions=1089)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with a finished pretrain run of one layer of size 16, for images of 16 px and texts of 8 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "outputs"
    run = new_run(str(folder), "pretrain", None, None)
    run.describe(composition("task=pretrain"))
    save_run(run.path, save_tokenizer(folder / "tokenizer" / "model"))
    run.finish({})
    return folder


def taken(*words: str) -> tuple[DictConfig, list[str]]:
    """Configuration and sentences of a command line."""
    config = composition(*words)
    return config, take_from_weights(config, [quote_override(word) for word in words])


def test_a_finetune_takes_everything_from_the_downloads(weights: Path) -> None:
    config, said = taken("task=style", f"init_from={weights}", HEADS, "outputs=nowhere")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.num_positions) == (2, 32, 2, 1089)
    assert model.dropout == 0.1
    assert config.init_from == str(weights / "cogview-base")
    assert config.text.model == str(weights / "cog-pretrain.model") and config.text.vocab_size == 50_000
    assert config.image_tokenizer.path == str(weights / "tokenizer.pt")
    assert config.image_tokenizer.codebook_size == 8192
    assert config.data.image_size == config.image_tokenizer.image_size == 256
    assert config.template.layout == "[ROI1] {text} [BASE] [BOI1] {image:32x32} [EOI1]"
    assert config.text.max_length == 61
    assert config.sequences.replay_share == 0
    assert "model.num_layers=2" in said[0] and "image_size=256" in said[0]
    assert "sequences.replay_share=0.3 becomes 0" in said[1]


def test_texts_are_as_long_as_the_positions_allow(weights: Path) -> None:
    config, _ = taken("task=caption", f"init_from={weights}", HEADS)
    assert config.text.max_length == 60  # a caption ends with [SEP]
    config, _ = taken("task=super_resolution", f"init_from={weights}", HEADS)
    assert config.text.max_length == 61
    config, _ = taken("task=caption", f"init_from={weights}", HEADS, "text.max_length=20")
    assert config.text.max_length == 20


def test_each_key_finds_its_own_transformer(weights: Path) -> None:
    every = [f"{key}={weights}" for key in ("init_from", "upscale_with", "rerank_with")]
    config, _ = taken("task=generate", *every, HEADS)
    found = [Path(config[key]).name for key in ("init_from", "upscale_with", "rerank_with")]
    assert found == ["cogview-base", "cogview-sr", "cogview-caption"]
    config, _ = taken("task=generate", f"init_from={weights}", "images=x", HEADS)
    assert Path(config.init_from).name == "cogview-caption" and config.template.target == "text"
    config, _ = taken("task=generate", f"init_from={weights}", "images=x", "complete.keep=top:0.5", HEADS)
    assert Path(config.init_from).name == "cogview-base" and config.template.target == "image"
    config, _ = taken("task=convert", f"convert.source={weights}/cogview-sr", "convert.target=x", HEADS)
    assert config.template.target == "large" and dict(config.template.loss) == {"large": 1.0}
    assert config.text.model == str(weights / "cog-pretrain.model")
    config, _ = taken("task=tokenize", f"image_tokenizer.path={weights}")
    assert config.image_tokenizer.path == str(weights / "tokenizer.pt")
    assert (config.data.image_size, config.text.max_length) == (256, 61)


def test_a_finetune_takes_the_sizes_of_a_run(outputs: Path) -> None:
    config, said = taken("task=caption", f"outputs={outputs}")
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_heads) == (1, 16, 2)
    assert (config.data.image_size, config.image_tokenizer.downsampling) == (16, 8)
    assert config.text.max_length == 7  # 8 and no place for [SEP]
    assert "num_layers=1" in said[0]
    for words in (("task=generate",), ("task=generate", "model=small"), ("task=rerank",)):  # the folder decides
        unchanged, said = taken(*words, f"outputs={outputs}")
        assert unchanged == composition(*words, f"outputs={outputs}") and not said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("task=style", "model.num_layers=3"), "num_layers=1, this run model.num_layers=3"),
        (("task=style", "model=tiny"), "has 1 layers of size 16, this run 3 of 96; leave model out"),
        (("task=style", "init_from=gone"), "init_from=gone does not exist"),
        (("task=style", "starts_from=caption"), "run `python -m cogview_pl.run task=caption` first"),
    ],
)
def test_another_model_is_not_taken_for_the_one_that_was_asked_for(
    outputs: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        taken(*words, f"outputs={outputs}")


def test_files_do_not_tell_the_heads_of_other_sizes(weights: Path) -> None:
    with pytest.raises(UserError, match=r"2 layers of size 32, and the files do not tell.*set model\.num_heads"):
        taken("task=style", f"init_from={weights}")


@pytest.mark.parametrize("task", ["style", "caption", "generate", "magnify", "rerank"])
@pytest.mark.parametrize("has_a_toy_model", [False, True])
def test_missing_weights_are_one_screen(
    outputs: Path, tmp_path: Path, task: str, has_a_toy_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        taken(f"task={task}", "model=cogview_4b", *([f"outputs={outputs}"] if has_a_toy_model else []))
    key = {"magnify": "upscale_with", "rerank": "rerank_with"}.get(task, "init_from")
    assert str(caught.value).startswith(f"task={task} needs the weights of model=cogview_4b, and {key} is null")
    lines = caught.value.details
    assert len(lines) <= 20 and all(len(line) <= 120 or "cogview_pl.run" in line for line in lines)
    text = "\n".join(lines)
    for name in ("cogview-base/", "cogview-sr/", "cogview-caption/", "cog-pretrain.model", "7.86 GB", "THUDM/CogView"):
        assert name in text
    (command,) = [line for line in lines if "cogview_pl.run" in line]
    recipe = task in ("style", "caption")
    assert (f"experiment=cogview_4b_{task}_lora" if recipe else f"task={task}") in command
    assert f" {key}=weights" in command and ("data." in command) == recipe


def test_a_plan_needs_no_weights(outputs: Path) -> None:
    words = ("task=style", "model=cogview_4b", "plan=true", f"outputs={outputs}")
    assert taken(*words)[0] == composition(*words)


def test_the_screen_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cogview.pt").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"holds no folder or file of a transformer .*cogview\.pt is damaged"):
        taken("task=style", f"init_from={tmp_path}")


def test_a_missing_tokenizer_is_named(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "cogview-base").symlink_to(weights / "cogview-base")
    (tmp_path / "tokenizer.pt").symlink_to(weights / "tokenizer.pt")
    with pytest.raises(UserError, match=r"cog-pretrain\.model which is not in .*; put it there, or set text\.model"):
        taken("task=style", f"init_from={tmp_path}", HEADS)
    (tmp_path / "cog-pretrain.model").symlink_to(weights / "cog-pretrain.model")
    torch.save({"quantize_t.embed": torch.zeros(4, 16), "enc_b.blocks.0.bias": torch.zeros(8)}, tmp_path / "other.pt")
    config, _ = taken("task=style", f"init_from={tmp_path}", HEADS)
    assert config.image_tokenizer.path == str(tmp_path / "tokenizer.pt")  # the other one makes another vocabulary
    (tmp_path / "same.pt").symlink_to(weights / "tokenizer.pt")
    with pytest.raises(UserError, match=r"several files for image_tokenizer\.path: .*same\.pt.*tokenizer\.pt"):
        taken("task=style", f"init_from={tmp_path}", HEADS)
