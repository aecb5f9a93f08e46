"""Super-resolution and styles are finetuned from a pretrained model by one command each; mistakes end in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from cogview_pl import CogView
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.generation.super_resolution.consistency import consistent, resized
from cogview_pl.toy_world.captions import parse_caption
from cogview_pl.vocab import TextTokenizer
from cogview_pl.vqvae.losses import psnr

from ..toy_world.toy_images import toy_images


@pytest.fixture(scope="module")
def home(cli, chain, tiny, tmp_path_factory) -> Path:
    """A folder with the outputs of the chain, and both finetunes after a few steps."""
    home = tmp_path_factory.mktemp("finetunes")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    cli.succeed(["task=super_resolution", *tiny], home)
    cli.succeed(["task=style", "data.styles=[oil,ink]", "sequences.conditioning_dropout=0.2", *tiny], home)
    return home


def records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def metrics(home: Path, task: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((home / "outputs" / task / "latest" / "metrics.json").read_text())
    return found


def test_tokens_are_made_on_the_spot_with_the_tokenizers_of_the_start(home: Path) -> None:
    for task in ("super_resolution", "style"):
        store = TokenStore.open(home / "outputs" / task / "latest" / "tokens" / "token_store")
        pretrained = TokenStore.open(home / "outputs" / "tokenize" / "latest" / "token_store")
        store.require(
            text_tokenizer=pretrained.header.text_tokenizer, image_tokenizer=pretrained.header.image_tokenizer
        )
        assert store.header.large == (task == "super_resolution")
        assert store.header.splits["train"].rows == metrics(home, task)["tokenize/rows_train"] == 64


def test_magnified_images_are_compared_with_the_truth(cli, home: Path) -> None:
    cli.succeed(["task=magnify", "num_prompts=3", "data.val_size=8"], home)
    run = home / "outputs" / "magnify" / "latest"
    written = records(run / "samples.jsonl")
    assert [record["prompt"] for record in written] == [toy_images("val", 8).text(i) for i in range(3)]
    assert {(record["width"], record["height"]) for record in written} == {(128, 128)}
    truth = toy_images("val", 8, image_size=128)
    drawn = torch.stack([truth[i].image / 255 for i in range(3)])
    found, upscaled = metrics(home, "magnify"), enlarged(run)
    assert found["magnify/psnr"] == pytest.approx(float(psnr(upscaled, drawn)), abs=0.02)  # 8-bit PNGs
    assert found["magnify/psnr_bicubic"] != found["magnify/psnr"]
    small = resized(drawn, 64)
    assert found["magnify/psnr_bicubic_undecoded"] == pytest.approx(float(psnr(resized(small, 128), drawn)), abs=0.05)

    cli.succeed(["task=magnify", "num_prompts=3", "data.val_size=8", "sampler.consistency=1"], home)
    agreeing = enlarged(home / "outputs" / "magnify" / "latest")
    assert torch.allclose(agreeing, consistent(upscaled, small, 1.0), atol=0.02)
    assert metrics(home, "magnify")["magnify/psnr"] > found["magnify/psnr"] + 3  # six steps of training know little


def enlarged(run: Path) -> Tensor:
    """Images of a run of task=magnify, 0 … 1."""
    return torch.stack([pil_to_tensor(Image.open(run / str(r["file"]))) / 255 for r in records(run / "samples.jsonl")])


def test_magnifies_samples_and_folders(cli, home: Path, tmp_path: Path) -> None:
    Image.new("RGB", (70, 90), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    cli.succeed(["task=magnify", "pairs=outputs/generate/latest"], home)
    prompts = [record["prompt"] for record in records(home / "outputs" / "magnify" / "latest" / "samples.jsonl")]
    assert prompts == [record["prompt"] for record in records(home / "outputs" / "generate" / "latest/samples.jsonl")]
    cli.succeed(["task=magnify", f"images={tmp_path}"], home)
    run = home / "outputs" / "magnify" / "latest"
    assert [Path(str(record["source"])).name for record in records(run / "samples.jsonl")] == ["a.png"]
    assert [Path(str(record["file"])).name for record in records(run / "skipped.jsonl")] == ["b.png"]


def test_generate_enlarges(cli, home: Path) -> None:
    command = ["task=generate", "init_from=outputs/style/latest", "upscale_with=outputs/super_resolution/latest"]
    cli.succeed(
        [*command, "prompts=[左边有一个大的红色圆形的油画图像]", "num_images_per_prompt=2", "sampler.guidance=2"], home
    )
    written = records(home / "outputs" / "generate" / "latest" / "samples.jsonl")
    assert [record["width"] for record in written] == [128, 128]


def test_a_style_model_generates(home: Path) -> None:
    images = CogView.load(home / "outputs" / "style" / "latest", "cpu").generate("素描风格的左边有一个大的红色圆形")
    assert [image.size for image in images] == [(64, 64)]


def test_style_captions_name_the_style(home: Path) -> None:
    tokens = home / "outputs" / "style" / "latest" / "tokens"
    text = TextTokenizer.load(tokens / "text.model")
    rows = TokenStore.open(tokens / "token_store").split("train")
    captions = [text.decode(rows[i][0]["text"]) for i in range(len(rows))]
    assert all(("油画" in caption) != ("中国画" in caption) for caption in captions)
    assert all(parse_caption(caption) for caption in captions)


def test_mistakes(cli, home: Path, tiny, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    for name in "abcdef":
        Image.new("RGB", (100, 100), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("红色")
    (tmp_path / "gone.jsonl").write_text('{"prompt": "a", "file": "gone.png"}\n')
    data = ["data=folder", f"data.root={folder}", "data.batch_size=2", "data.val_fraction=0.3"]
    cases = [
        (["task=super_resolution", "outputs=nowhere"], ["init_from", "task=pretrain"]),
        (["task=super_resolution", *data], ["100x100", "128"]),
        (
            ["task=super_resolution", "data.token_store=outputs/tokenize/latest"],
            ["data.token_store", "token_store.large=true"],
        ),
        (["task=super_resolution", "model.num_layers=7"], ["num_layers"]),
        (["task=style", "data.styles=[marble]"], ["data.styles", "marble", "oil"]),
        (["task=style", *data], ["data.style_patterns"]),
        (["task=style", "sequences.replay_share=1.0"], ["sequences.replay_share"]),
        (["task=style", "sequences.replay_store=gone"], ["sequences.replay_store=gone"]),
        (["task=caption", "sequences.conditioning_dropout=0.1"], ["sequences.conditioning_dropout"]),
        (["task=magnify", "upscale_with=outputs/pretrain/latest"], ["super_resolution"]),
        (["task=magnify", f"pairs={tmp_path}/gone.jsonl"], ["gone.png", "file not found"]),
        (["task=generate", "init_from=outputs/super_resolution/latest"], ["super-resolution", "task=magnify"]),
        (["task=generate", "sampler.consistency=0.5"], ["sampler.consistency=0.5", "upscale_with"]),
        (["task=generate", "upscale_with=outputs/pretrain/latest"], ["super_resolution"]),
        (["task=rerank", "pairs=outputs/generate/latest", "rerank_with=outputs/style/latest"], ["task=caption"]),
    ]
    cli.refuse([([*args, *TINY_STEPS], words) for args, words in cases], home, tmp_path)


TINY_STEPS = ("trainer.max_steps=2", "threads=1")
