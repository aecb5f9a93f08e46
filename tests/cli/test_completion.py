"""`task=generate` with `complete`: files, records, order, resume and mistakes; models have random weights."""

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

from .rewound import require_same_results, rewind_samples

SIZES = (
    "image_tokenizer.image_size=32",
    "image_tokenizer.hidden_size=8",
    "image_tokenizer.codebook_size=64",
    "text.max_length=100",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=1",
    "model.num_positions=256",
)
FEW = ("data.image_size=32", "data.val_size=8", "threads=1", "plan.strict=false", "sampler.batch_size=4", "seed=3")
CAPTIONS = {"0.png": "红色的圆形", "1.png": "蓝色的心形", "2.png": "一个大的绿色三角形"}
EACH = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a folder of captioned images, one of them damaged, and masks."""
    home = tmp_path_factory.mktemp("completion")
    for task in ("pretrain", "caption"):
        make_tokens(home / task, [f"task={task}", *SIZES])
        make_model(home / task, [f"task={task}", *SIZES])
    images = home / "images"
    images.mkdir()
    for (name, caption), colour in zip(CAPTIONS.items(), ("red", "blue", "green"), strict=True):
        Image.new("RGB", (40, 32), colour).save(images / name)
        (images / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    shutil.copytree(images, home / "damaged")
    (home / "damaged" / "1.png").write_bytes(b"no image")
    box = Image.new("L", (32, 32))
    box.paste(255, (8, 8, 24, 24))
    box.save(home / "box.png")
    Image.new("L", (31, 32)).save(home / "narrow.png")
    Image.new("L", (32, 32)).save(home / "black.png")
    return home


@pytest.fixture(scope="module")
def commands(home: Path) -> dict[str, list[str]]:
    model = f"init_from={home}/pretrain/pretrain/latest"
    upper = [f"images={home}/images", "complete.keep=top:0.5"]
    one_prompt = [f"images={home}/damaged", "prompts=红色的圆形", "complete.keep=left:0.5"]
    several = f"num_images_per_prompt={EACH}"
    return {
        "prefix": ["task=generate", model, *upper, *FEW],
        "box": ["task=generate", model, f"images={home}/images", f"complete.mask={home}/box.png", several, *FEW],
        "jacobi": ["task=generate", model, *upper, "sampler.algorithm=jacobi", *FEW],
        "guided": ["task=generate", model, *one_prompt, "sampler.guidance=2", *FEW],
        "toy": ["task=generate", model, "num_prompts=3", "complete.keep=border:0.25", several, *FEW],
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(cli, commands: dict[str, list[str]], home: Path) -> dict[str, str]:
    """Name → messages; runs in `home`."""
    cases = [([*words, f"run_dir={name}"], home) for name, words in commands.items()]
    cases.append(([*commands["box"], "plan=true"], home))
    ended = cli.run_many(cases, home)
    for result in ended:
        assert result.code == 0, result.stderr[-3000:]
    return {name: result.stdout + result.stderr for name, result in zip([*commands, "plan"], ended, strict=True)}


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_captions_of_the_folder_are_the_prompts(runs, home: Path) -> None:
    found = records(home / "prefix")
    assert [record["prompt"] for record in found] == list(CAPTIONS.values())
    assert [Path(str(record["source"])).name for record in found] == list(CAPTIONS)
    assert "given_loss" not in found[0]
    with Image.open(home / "prefix" / "samples" / "grid.png") as sheet:
        assert sheet.width > 2 * 96  # given and result, side by side
    assert records(home / "jacobi")[0]["source"] == found[0]["source"]


def test_several_are_ordered_by_the_likelihood_of_given_codes(runs, home: Path) -> None:
    found = records(home / "box")
    assert len(found) == EACH * len(CAPTIONS)
    for first in range(0, len(found), EACH):
        group = found[first : first + EACH]
        assert {record["seed"] for record in group} == {3, 4, 5}
        losses = [record["given_loss"] for record in group]
        assert losses == sorted(losses)  # type: ignore[type-var]
    assert "Memory at the peak" in runs["plan"]


def test_a_damaged_image_is_left_out_aloud(runs, home: Path) -> None:
    found = records(home / "guided")
    assert [Path(str(record["source"])).name for record in found] == ["0.png", "2.png"]
    assert {record["prompt"] for record in found} == {"红色的圆形"}
    assert "left out: 1 images that cannot be read" in runs["guided"]


def test_validation_images_of_the_toy_world_are_judged(runs, home: Path) -> None:
    metrics = json.loads((home / "toy" / "metrics.json").read_text())
    assert metrics["generate/images"] == 3 * EACH
    assert {"toy/all_right", "toy/all_right_best_of_1", "toy/all_right_oracle_of_2"} <= metrics.keys()


def test_python_gives_the_images_of_the_command(runs, home: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = CogView.load(home / "pretrain/pretrain/latest", "cpu")
    rows = model.complete(
        [home / "images" / name for name in CAPTIONS],
        list(CAPTIONS.values()),
        mask=home / "box.png",
        num_images_per_prompt=EACH,
        top_n=2,
        seed=3,
        sampling=Sampling(batch_size=4),
        folder=tmp_path / "saved",
        progress=False,
    )
    torch.set_num_threads(threads)
    for number, row in enumerate(rows):
        for place, image in enumerate(row):
            with Image.open(home / "box" / "samples" / f"{number:04d}" / f"{place:02d}.png") as stored:
                assert np.array_equal(np.asarray(image), np.asarray(stored))
    assert (tmp_path / "saved" / "samples" / "grid.png").is_file()


def test_runs_go_on(cli, runs, home: Path, tmp_path: Path) -> None:
    cases = []
    for name, lines in (("prefix", 0), ("prefix", 2), ("box", 4), ("toy", 3)):
        run = tmp_path / f"{name} {lines}"
        shutil.copytree(home / name, run)
        rewind_samples(run, lines)
        cases.append(([f"resume={run}"], tmp_path))
    for ended in cli.run_many(cases, tmp_path):
        assert ended.code == 0, ended.stderr[-3000:]
    for (word,), _ in cases:
        run = Path(word.removeprefix("resume="))
        require_same_results(home / run.name.partition(" ")[0], run)


def test_mistakes(cli, commands, home: Path, tmp_path: Path) -> None:
    begun = commands["prefix"][:3]  # without `complete`
    box = [*begun, f"complete.mask={home}/box.png"]
    cases = [
        ([*begun, "complete.keep=upper"], ["complete.keep=upper", "top:0.5"]),
        ([*begun, "complete.keep=top:1"], ["complete.keep=top:1 keeps 4 of 4", "from 1 to 3"]),
        ([*begun, "complete.keep=top:0.5", "complete.mask=a.png"], ["complete.keep", "complete.mask", "both"]),
        ([*begun, f"complete.mask={home}/narrow.png"], ["complete.mask", "31x32", "32x32", "4x4"]),
        ([*begun, f"complete.mask={home}/black.png"], ["complete.mask", "no white pixels"]),
        ([*begun, f"complete.mask={home}/gone.png"], ["complete.mask", "file not found"]),
        ([*box, "sampler.algorithm=jacobi"], ["sampler.algorithm=jacobi", "sequential"]),
        ([*begun, "complete.keep=top:0.5", "top_n=1"], ["top_n=1", "rerank_with"]),
        ([*box, "prompts=[红,蓝]"], ["prompts: 2 for 3 images"]),
        ([*begun[:2], "complete.keep=top:0.5", "prompts=红"], ["complete", "set images"]),
        ([*begun[:2], f"images={home}/images/0.png", "complete.keep=top:0.5"], ["images=", "set prompts"]),
        ([*begun[:2], f"images={home}/pretrain", "complete.keep=top:0.5"], [f"images={home}/pretrain"]),
        (
            [begun[0], f"init_from={home}/caption/pretrain/latest", begun[2], "complete.keep=top:0.5"],
            ["layout", "task=pretrain"],
        ),
        (["task=magnify", "complete.keep=top:0.5"], ["complete.keep has no effect on task=magnify"]),
    ]
    cli.refuse([([*words, *FEW], messages) for words, messages in cases], tmp_path, tmp_path)
