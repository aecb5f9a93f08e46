"""Captions, rankings and magnified images of a run that was killed and resumed are those of a whole run."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.random_runs import make_model, make_tokens

from .rewound import require_same_results, rewind_samples

pytestmark = pytest.mark.slow

FEW = ("data.image_size=32", "data.val_size=8", "threads=1", "plan.strict=false", "sampler.batch_size=2", "seed=3")
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven image files, two of them damaged, and a list of pairs whose prompts take turns."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "green", "blue", "white", "black", "brown", "orange")):
        Image.new("RGB", (70, 66), colour).save(folder / f"{number}.png")
    for number in (0, 3):
        (folder / f"{number}.png").write_bytes(b"no image")
    pairs = [{"prompt": "红色的圆形" if number % 2 else "蓝色的心形", "file": f"{number}.png"} for number in range(7)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a model with random weights."""
    home = tmp_path_factory.mktemp("models")
    found = {}
    for task in ("caption", "super_resolution"):
        make_tokens(home / task, [f"task={task}", *SIZES])
        make_model(home / task, [f"task={task}", *SIZES])
        found[task] = home / task / "pretrain" / "latest"
    return found


@pytest.fixture(scope="module")
def commands(models: dict[str, Path], pictures: Path) -> dict[str, list[str]]:
    captioner, upscaler = f"rerank_with={models['caption']}", models["super_resolution"]
    return {
        "described": ["task=generate", f"init_from={models['caption']}", f"images={pictures}", *FEW],
        "judged": ["task=generate", f"init_from={models['caption']}", "num_prompts=5", *FEW],
        "ranked": ["task=rerank", captioner, f"pairs={pictures / 'pairs.jsonl'}", *FEW],
        "found": ["task=rerank", captioner, "num_prompts=5", "num_captions=3", *FEW],
        "magnified": ["task=magnify", f"upscale_with={upscaler}", "num_prompts=5", *FEW],
        "magnified files": ["task=magnify", f"upscale_with={upscaler}", f"images={pictures}", *FEW],
    }


@pytest.fixture(scope="module")
def whole(cli, commands, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    for ended in cli.run_many([([*words, f"run_dir={name}"], home) for name, words in commands.items()], home):
        assert ended.code == 0, ended.stderr[-3000:]
    return home


def test_runs_go_on_after_any_line(cli, whole: Path, tmp_path: Path) -> None:
    """After no line, within and at the end of a batch, and after the last line, when a ranking is already sorted."""
    cases = []
    for name in ("described", "judged", "ranked", "found", "magnified", "magnified files"):
        for lines in (0, 2, 3, 5):
            run = tmp_path / f"{name} {lines}"
            shutil.copytree(whole / name, run)
            rewind_samples(run, lines)
            cases.append(([f"resume={run}"], tmp_path))
    for ended in cli.run_many(cases, tmp_path):
        assert ended.code == 0, ended.stderr[-3000:]
    for (word,), _ in cases:
        run = Path(word.removeprefix("resume="))
        require_same_results(whole / run.name.rpartition(" ")[0], run)


@pytest.mark.parametrize("name", ["ranked", "magnified files"])
def test_a_killed_run_goes_on(cli, commands, whole: Path, tmp_path: Path, name: str) -> None:
    process = cli.start([*commands[name], "run_dir=run"], tmp_path)
    listed = tmp_path / "run" / "samples.jsonl"
    while not (listed.exists() and listed.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    process.communicate()
    if not (tmp_path / "run" / "metrics.json").exists():
        cli.succeed(["resume=run"], tmp_path)
    require_same_results(whole / name, tmp_path / "run")


def test_what_has_changed_is_refused(cli, whole: Path, pictures: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[Path], None], *words: str) -> list[str]:
        run = tmp_path / f"{name} {len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole / name, run)
        rewind_samples(run, 2)
        change(run)
        return [f"resume={run}", *words]

    def nothing(run: Path) -> None:
        pass

    def touch(run: Path) -> None:
        (pictures / "5.png").touch()

    cases = [
        (changed("described", nothing, "seed=4"), ["seed=3", "this run has 4"]),
        (changed("found", nothing, "num_captions=4"), ["num_captions=3", "this run has 4"]),
        (changed("magnified", nothing, "data.seed=9"), ["data has changed since"]),
        (changed("ranked", touch), ["pairs has changed since"]),
        (changed("magnified files", nothing), ["images has changed since"]),
    ]
    cli.refuse(cases, tmp_path, tmp_path)


def test_an_image_that_was_damaged_is_made_again(cli, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole / "magnified", run)
    rewind_samples(run, 5)
    (run / "samples" / "0002.png").write_bytes(b"damaged")
    (run / "samples" / "0004.png").unlink()
    cli.succeed([f"resume={run}"], tmp_path)
    require_same_results(whole / "magnified", run)
