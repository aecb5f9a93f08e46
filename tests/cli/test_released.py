"""Released checkpoints from the command line: used as they are, converted both ways, refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import released_settings, save_transformer, save_vqvae
from cogview_pl.vocab import TextTokenizer, Vocabulary
from tests.make_models import make_transformer

from ..texts import learned_text

NUM_CODES = 16
CAPTIONS = ["红色的圆形", "蓝色的心形", "一个绿色的三角形"]


class Hostile:
    """Writes a file if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny release: tokenizer, text model, and three transformers with random weights under the released names."""
    folder = tmp_path_factory.mktemp("release")
    torch.manual_seed(0)
    save_vqvae(build_vqvae(released_settings(8, 4, NUM_CODES)), folder / "tokenizer.pt")
    for name, text_vocab_size in (("text.model", 290), ("other_text.model", 520)):
        captions = CAPTIONS if name == "text.model" else [f"{c}{chr(0x4E00 + i)}" for i in range(200) for c in CAPTIONS]
        learned_text(captions, vocab_size=text_vocab_size).save(folder / name)
    vocabulary = Vocabulary(NUM_CODES, TextTokenizer.load(folder / "text.model").vocab_size)
    for name in ("cogview-base", "cogview-sr", "cogview-caption"):
        sizes = {"vocab_size": vocabulary.size, "num_layers": 2, "hidden_size": 32, "num_heads": 2}
        save_transformer(make_transformer(**sizes, num_positions=64, init_std=0.2), folder / name)
    torch.save({"module": {}, "extra": Hostile(folder / "was_here")}, folder / "hostile.pt")
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def options(release: Path) -> list[str]:
    """Options that a run with released weights needs."""
    return [
        *("model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.num_positions=64"),
        *("image_tokenizer.image_size=32", "text.max_length=16", "threads=1"),
        f"text.model={release}/text.model",
        f"image_tokenizer.path={release}/tokenizer.pt",
    ]


def generate(release: Path, base: Path, sr: Path, caption: Path) -> list[str]:
    return [
        *("task=generate", f"init_from={base}", f"upscale_with={sr}", f"rerank_with={caption}"),
        *("prompts=[红色的圆形,蓝色的心形]", "num_images_per_prompt=3", "top_n=2"),
    ]


@pytest.fixture(scope="module")
def generated(cli, release: Path, options: list[str], tmp_path_factory) -> Path:
    """A run that generates, ranks and upscales with the released folders as they are."""
    home = tmp_path_factory.mktemp("generated")
    folders = [release / f"cogview-{name}" for name in ("base", "sr", "caption")]
    cli.succeed([*generate(release, *folders), *options], home)
    return home / "outputs" / "generate" / "latest"


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_generated_ranked_and_upscaled(generated: Path) -> None:
    found = records(generated)
    assert [record["prompt"] for record in found] == ["红色的圆形"] * 2 + ["蓝色的心形"] * 2
    for first, second in (found[:2], found[2:]):
        assert first["caption_loss"] <= second["caption_loss"]  # best first
        assert first["seed"] != second["seed"]
    for record in found:
        assert (record["width"], record["height"]) == (64, 64)  # twice the 32 pixels of the tokenizer
        assert Image.open(generated / str(record["file"])).size == (64, 64)


@pytest.mark.slow
def test_converted_models_generate_the_same_images(cli, release, options, generated, tmp_path: Path) -> None:
    ours = [tmp_path / name for name in ("base", "sr", "caption")]
    templates = ("text_image", "super_resolution", "image_text")
    for folder, template in zip(ours, templates, strict=True):
        source = release / f"cogview-{folder.name}"
        convert = ["task=convert", f"convert.source={source}", f"convert.target={folder}", f"template={template}"]
        cli.succeed([*convert, *options], tmp_path)
    cli.succeed(generate(release, *ours), tmp_path)
    run = tmp_path / "outputs" / "generate" / "latest"
    assert records(run) == records(generated)
    for record in records(run):
        assert (run / str(record["file"])).read_bytes() == (generated / str(record["file"])).read_bytes()
    back = tmp_path / "back"
    cli.succeed(["task=convert", f"convert.source={ours[0]}", f"convert.target={back}"], tmp_path)
    file = "1/mp_rank_00_model_states.pt"
    found, wanted = (torch.load(path / file)["module"] for path in (back, release / "cogview-base"))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_converted_tokenizer_goes_back(cli, release: Path, options: list[str], tmp_path: Path) -> None:
    there = ["task=convert", f"convert.source={release}/tokenizer.pt", "convert.target=ours", *options]
    (following,) = [line for line in cli.succeed(there, tmp_path).stdout.splitlines() if line.startswith("  next  ")]
    assert " task=tokenize " in following and following.endswith(" image_tokenizer.path=ours")
    back = cli.succeed(["task=convert", "convert.source=ours", "convert.target=back.pt"], tmp_path)
    assert "  next  " not in back.stdout  # the program of the released models goes on with it
    found, wanted = (torch.load(file) for file in (tmp_path / "back.pt", release / "tokenizer.pt"))
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_mistakes(cli, release: Path, options: list[str], tmp_path: Path) -> None:
    command = ["task=generate", "prompts=[红色]", f"init_from={release}/cogview-base", *options]
    convert = ["task=convert", f"convert.source={release}/tokenizer.pt", *options]
    converted_sr = [f"convert.source={release}/cogview-sr", "convert.target=sr", "template=super_resolution"]
    cli.succeed(["task=convert", *converted_sr, *options], tmp_path)
    (tmp_path / "truncated.pt").write_bytes((release / "tokenizer.pt").read_bytes()[:-500])
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "cogview-base").symlink_to(release / "cogview-base")
    alone = ["task=generate", "prompts=[红色]", "init_from=alone/cogview-base", *options[:-2]]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = [
        ([*alone, f"image_tokenizer.path={release}/tokenizer.pt"], ["init_from", "cog-pretrain.model", "text.model"]),
        ([*alone, f"text.model={release}/text.model"], ["init_from", "image_tokenizer.path"]),
        ([*command, f"text.model={release}/other_text.model"], ["init_from", "vocabulary", "text.model"]),
        ([*command, "model.num_layers=3"], ["num_layers=2", "model.num_layers=3"]),
        ([*command, f"rerank_with={release}/cogview-sr"], ["rerank_with", "cogview-sr", "upscale_with"]),
        ([*command, f"rerank_with={tmp_path}/sr"], ["layout", "task=caption"]),
        ([*command, f"upscale_with={release}/cogview-caption"], ["upscale_with", "cogview-caption"]),
        ([*command, "top_n=1"], ["top_n=1", "rerank_with"]),
        ([*command, "compat=official", "sampler.guidance=3"], ["sampler.guidance=3", "compat=official"]),
        ([*command, f"image_tokenizer.path={release}/hostile.pt"], ["image_tokenizer.path", "refused", "system"]),
        ([*command, f"image_tokenizer.path={tmp_path}/truncated.pt"], ["truncated.pt", "damaged"]),
        ([*command, f"image_tokenizer.path={release}/cogview-base/1/mp_rank_00_model_states.pt"], ["module"]),
        ([*convert, "convert.target=full"], ["convert.target=full", "exists"]),
        ([*convert], ["convert.target"]),
        ([*convert, "convert.target=x", "convert.source=nowhere"], ["convert.source=nowhere"]),
    ]
    cli.refuse(cases, tmp_path, tmp_path)
    assert not (release / "was_here").exists()
