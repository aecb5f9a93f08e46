"""The captioner is finetuned from a pretrained model, describes images and ranks them; mistakes end in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def home(cli, chain, tiny, tmp_path_factory) -> Path:
    """A folder with the outputs of the chain, and a captioner that was finetuned for a few steps."""
    home = tmp_path_factory.mktemp("captions")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    cli.succeed(["task=caption", *tiny], home)
    return home


@pytest.fixture(scope="module")
def images(home: Path) -> Path:
    """Three images, one of them damaged."""
    folder = home / "images"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (80, 64), colour).save(folder / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"no image")
    return folder


def records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_describes_what_can_be_read(cli, home: Path, images: Path) -> None:
    ended = cli.succeed(["task=generate", f"images={images}"], home)
    run = home / "outputs" / "generate" / "latest"
    assert [Path(str(record["file"])).name for record in records(run / "samples.jsonl")] == ["0.png", "1.png"]
    assert all(isinstance(record["caption"], str) for record in records(run / "samples.jsonl"))
    assert [Path(str(record["file"])).name for record in records(run / "skipped.jsonl")] == ["damaged.png"]
    assert "1 images" in ended.stdout + ended.stderr
    assert (run / "samples" / "grid.png").exists()


def test_validation_images_are_judged(cli, home: Path) -> None:
    cli.succeed(["task=generate", "init_from=outputs/caption/latest", "num_prompts=4", "data.val_size=8"], home)
    metrics = json.loads((home / "outputs" / "generate" / "latest" / "metrics.json").read_text())
    assert {"toy/caption_colour_accuracy", "toy/caption_shape_accuracy"} <= metrics.keys()


def test_ranks_a_list_and_skips_what_is_missing(cli, home: Path, images: Path) -> None:
    rows = [("红色的圆形", "0.png"), ("红色的圆形", "1.png"), ("蓝色的圆形", "1.png"), ("红色的圆形", "gone.png")]
    pairs = images / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": p, "file": f}, ensure_ascii=False) + "\n" for p, f in rows))
    cli.succeed(["task=rerank", f"pairs={pairs}"], home)
    run = home / "outputs" / "rerank" / "latest"
    scored = records(run / "samples.jsonl")
    assert [record["prompt"] for record in scored] == ["红色的圆形", "红色的圆形", "蓝色的圆形"]
    assert scored[0]["caption_loss"] <= scored[1]["caption_loss"]  # type: ignore[operator]
    assert [record["file"] for record in records(run / "skipped.jsonl")] == ["gone.png"]
    assert json.loads((run / "metrics.json").read_text())["rerank/skipped"] == 1


def test_without_pairs_images_look_for_their_captions(cli, home: Path) -> None:
    cli.succeed(["task=rerank", "num_prompts=6", "num_captions=4", "data.val_size=8"], home)
    metrics = json.loads((home / "outputs" / "rerank" / "latest" / "metrics.json").read_text())
    assert metrics["rerank/images"] == 6 and metrics["rerank/captions"] == 4
    assert 0 <= metrics["rerank/own_caption_top1"] <= metrics["rerank/own_caption_top5"] == 1
    scored = records(home / "outputs" / "rerank" / "latest" / "samples.jsonl")
    losses = {
        (n, c): v for n, r in enumerate(scored) for c, v in zip(r["captions_of"], r["caption_losses"], strict=True)
    }
    assert all(losses[number, number] == record["caption_loss"] for number, record in enumerate(scored))
    means = {c: fmean(v for (_, other), v in losses.items() if other == c) for c in range(6)}
    best = [min(r["captions_of"], key=lambda c, n=n: losses[n, c] - means[c]) for n, r in enumerate(scored)]
    assert metrics["rerank/own_caption_information_top1"] == fmean(best[n] == n for n in range(6))


def test_mistakes(cli, home: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "gone.jsonl").write_text('{"prompt": "a", "file": "gone.png"}\n')
    cases = [
        (["task=caption", "outputs=nowhere"], ["init_from", "task=pretrain"]),
        (
            ["task=caption", "outputs=nowhere", "init_from=outputs/pretrain/latest"],
            ["data.token_store", "task=tokenize"],
        ),
        (["task=generate", "init_from=outputs/caption/latest", "prompts=[红色]"], ["prompts", "images"]),
        (["task=generate", "init_from=outputs/pretrain/latest", f"images={images}"], ["images", "task=caption"]),
        (["task=generate", "images=nowhere.png"], ["images=nowhere.png"]),
        (["task=rerank", "num_prompts=4", "num_captions=9"], ["num_captions=9", "4"]),
        (["task=rerank", "pairs=nowhere"], ["pairs=nowhere"]),
        (["task=rerank", f"pairs={tmp_path}/bad.jsonl"], ["bad.jsonl", "line 1", "file"]),
        (["task=rerank", f"pairs={tmp_path}/gone.jsonl"], ["gone.jsonl"]),
        (["task=rerank", f"pairs={images}/x.jsonl"], ["x.jsonl"]),
    ]
    (images / "x.jsonl").write_text("\n")
    wrong_model = [f"pairs={tmp_path}/gone.jsonl", "rerank_with=outputs/pretrain/latest"]
    cases.append((["task=rerank", *wrong_model], ["layout", "task=caption"]))
    cli.refuse(cases, home, tmp_path)
