"""A model that makes images from images: trained on pairs, run by one command and in Python, resumed, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.random_runs import make_model, make_tokens
from cogview_pl import CogView, Sampling
from cogview_pl.checkpoints.model_folder import load_image_tokenizer
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.errors import UserError
from cogview_pl.generation.codes import encode_images
from cogview_pl.toy_world.dataset import ToyDataset

from .rewound import KEEP_ALL, require_same, require_same_results, rewind, rewind_samples

SIZES = (
    "image_tokenizer.image_size=32",
    "image_tokenizer.hidden_size=8",
    "image_tokenizer.codebook_size=64",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=1",
    "model.num_positions=80",
)
FEW = ("threads=1", "plan.strict=false", "sampler.batch_size=4", "seed=3")
TRAINED = (
    *SIZES,
    *(
        "threads=1",
        "plan.strict=false",
        "init_from=outputs/pretrain/latest",
        "data.train_size=24",
        "data.val_size=8",
        "data.batch_size=8",
    ),
    *("trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "data.image_size=32"),
)
TOY = ("data.val_size=8", "data.image_size=32", "data.styles=[flat,oil]", "data.style_patterns=[{style}风格]")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (50, 40), colour).save(folder / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def home(cli, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights, two finetunes of it, and what they made."""
    home = tmp_path_factory.mktemp("transfer")
    make_tokens(home / "outputs", ["task=pretrain", *SIZES])
    make_model(home / "outputs", ["task=pretrain", *SIZES])
    (home / "images").symlink_to(pictures)
    commands = [
        ("task=style_transfer", *TRAINED, *KEEP_ALL, "run_dir=trained"),
        ("task=edit", *TRAINED, "trainer.max_steps=2", "run_dir=edits"),
        ("task=generate", *FEW, "init_from=trained", "images=images", "prompts=[油画风格,平面]", "run_dir=made"),
        (
            "task=generate",
            *FEW,
            "init_from=trained",
            *TOY,
            "num_prompts=3",
            "num_images_per_prompt=2",
            "run_dir=judged",
        ),
        ("task=generate", *FEW, "init_from=edits", "data.pairs=edits", *TOY[:2], "num_prompts=3", "run_dir=edited"),
    ]
    for ended in cli.run_many([(words, home) for words in commands], home):
        assert ended.code == 0, ended.stderr[-3000:]
    return home


def records(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pixels(file: Path | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(file) if isinstance(file, Path) else file)


def test_the_token_store_holds_both_images(home: Path) -> None:
    store = TokenStore.open(home / "trained" / "tokens" / "token_store")
    assert store.header.image_fields == ("source",) and store.header.splits["train"].rows == 24
    styles = ("flat", "oil", "sketch", "cartoon", "ink")
    options = {"styles": styles, "style_patterns": ("{style}",), "object_probabilities": (0.5, 0.35, 0.15)}
    pairs = ToyDataset("train", 32, train_size=24, val_size=8, image_fields=("source",), **options)
    model = load_image_tokenizer(home / "trained" / "tokens" / "image_tokenizer").model
    rows = store.split("train")
    for name, images in (
        ("source", [pairs[i].images["source"] for i in range(24)]),
        ("", [pairs[i].image for i in range(24)]),
    ):
        codes = encode_images(images, model, 8)
        stored = [rows.others(i)[name] if name else rows[i][1] for i in range(24)]
        assert torch.equal(codes, torch.stack(stored))
    metrics = json.loads((home / "trained" / "metrics.json").read_text())
    assert metrics["val/loss"] == pytest.approx(metrics["val/loss_image"]) and "val/loss_source" not in metrics


def test_every_image_with_every_prompt(home: Path) -> None:
    written = records(home / "made" / "samples.jsonl")
    named = [(Path(str(record["source"])).name, record["prompt"]) for record in written]
    assert named == [(f"{n}.png", prompt) for n in range(3) for prompt in ("油画风格", "平面")]
    assert all((home / "made" / str(record["file"])).is_file() and record["width"] == 32 for record in written)
    assert {Path(str(r["file"])).name for r in records(home / "made" / "skipped.jsonl")} == {"damaged.png"}
    assert json.loads((home / "made" / "metrics.json").read_text())["generate/images"] == 6


def test_pairs_of_the_toy_world_are_judged(home: Path) -> None:
    assert {"toy/kept_accuracy", "toy/all_right"} <= json.loads((home / "judged" / "metrics.json").read_text()).keys()
    written = records(home / "judged" / "samples.jsonl")
    assert [record["seed"] for record in written] == [3, 4] * 3
    sheet = Image.open(home / "judged" / "samples" / "grid.png")
    assert sheet.width == 2 * (4 * 100 + 4)  # two columns of the source, two results and the truth, 96 pixels each
    assert "toy/changed_accuracy" in json.loads((home / "edited" / "metrics.json").read_text())
    assert all(str(record["prompt"]).startswith("把") for record in records(home / "edited" / "samples.jsonl"))


def test_in_python_as_by_the_command(home: Path, pictures: Path) -> None:
    model = CogView.load(home / "trained", "cpu")
    sampling = Sampling(batch_size=4)
    given = [pictures / f"{number}.png" for number in range(3)]
    rows = model.edit(given, "油画风格", seed=3, sampling=sampling, progress=False)
    for number, (image,) in enumerate(rows):
        made = pixels(home / "made" / "samples" / f"{2 * number:04d}" / "00.png")
        assert np.abs(pixels(image).astype(int) - made).max() <= 1  # of other batches, which may round differently
    (one, other) = model.edit(Image.open(given[1]), "油画风格", num_images_per_prompt=2, seed=3, progress=False)
    assert one.size == other.size == (32, 32)
    with pytest.raises(UserError, match="makes images from images; task=generate images=DIR"):
        model.generate("红", progress=False)
    with pytest.raises(UserError, match="makes images from texts alone"):
        CogView.load(home / "outputs" / "pretrain" / "latest", "cpu").edit(given[0], "油画风格", progress=False)


def test_runs_go_on_as_if_never_stopped(cli, home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "trained", tmp_path / "trained")
    rewind(tmp_path / "trained", tmp_path / "whole")
    cases = [([f"resume={tmp_path}/trained"], home)]
    for name in ("made", "judged"):
        for lines in (0, 3, 5):
            run = tmp_path / f"{name} {lines}"
            shutil.copytree(home / name, run)
            rewind_samples(run, lines)
            cases.append(([f"resume={run}"], home))
    for ended in cli.run_many(cases, tmp_path):
        assert ended.code == 0, ended.stderr[-3000:]
    require_same(tmp_path / "whole", tmp_path / "trained")
    for (word,), _ in cases[1:]:
        run = Path(word.removeprefix("resume="))
        require_same_results(home / run.name.rpartition(" ")[0], run)


def test_mistakes(cli, home: Path, tmp_path: Path) -> None:
    small = ["task=style_transfer", *TRAINED]
    made = ["task=generate", "init_from=trained", *FEW]
    two = "template.layout='[ROI1] {text} [BOI1] {source:2x2} [EOI1] [ROI2] [BOI2] {image:4x4} [EOI2] [BOI3] {c:1x1}'"
    cases = [
        ([*small, "data.styles=[oil]"], ["data.styles=['oil']", "two styles"]),
        ([*small, "data.style_patterns=[]"], ["data.style_patterns is empty"]),
        ([*small, two], ["template.layout", "image slots source, image, c"]),
        (
            [*small, "data.token_store=outputs/tokenize/latest"],
            ["no images for slot source", "sequences.source=images"],
        ),
        ([*small, "data.image_size=64"], ["data.image_size=64", "32"]),
        ([*made, "images=images"], ["prompts has no value"]),
        ([*made, "images=nowhere", "prompts=[油画]"], ["images=nowhere"]),
        ([*made, *TOY, "data.style_patterns=[]"], ["data.style_patterns is empty"]),
        ([*made, "images=images", "prompts=[油画]", "rerank_with=trained"], ["rerank_with", "instructions"]),
        (["task=generate", *FEW, "images=images", "prompts=[油画]"], ["init_from", "task=style_transfer"]),
        (["task=generate", *FEW, "images=images", "init_from=outputs/pretrain/latest"], ["images", "style_transfer"]),
        ([*made, "images=images", f"prompts=[{'红' * 90}]"], ["text tokens", "shorten it"]),
    ]
    cli.refuse(cases, home, tmp_path)
