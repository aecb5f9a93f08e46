"""The Python API: the same results and defaults as the command line, in a process without a configuration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogview_pl
from cogview_pl import CogView, Sampling
from cogview_pl.errors import UserError

from ..composed import composed

ROOT = Path(__file__).parents[2]
PROMPTS = ["左上角有一个大的红色圆形", "it's (a) test"]
ASKED = ("threads=1", f"prompts=[{','.join(PROMPTS)}]", "num_images_per_prompt=2", "seed=7", "top_n=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, chain) -> Path:
    root = tmp_path_factory.mktemp("python")
    (root / "outputs").symlink_to(chain.home / "outputs")
    return root


@pytest.fixture(scope="module")
def runs(cli, home, tmp_path_factory) -> None:
    """The same by the command line."""
    roles = ("rerank_with=outputs/caption/latest", "upscale_with=outputs/super_resolution/latest")
    given = ("images=outputs/generate/latest/samples/0000", "seed=3", "threads=1")
    commands = [
        ("task=generate", *ASKED, *roles, "run_dir=generated"),
        ("task=generate", "init_from=outputs/caption/latest", *given, "run_dir=described"),
        ("task=magnify", *given, "run_dir=magnified"),
    ]
    for ended in cli.run_many([(words, home) for words in commands], tmp_path_factory.mktemp("cases")):
        assert ended.code == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def model(home):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield CogView.load(
        home / "outputs/pretrain/latest",
        "cpu",
        rerank_with=home / "outputs/caption/latest",
        upscale_with=home / "outputs/super_resolution/latest",
    )
    torch.set_num_threads(threads)


def pixels(image: Path | Image.Image) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image)


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def test_generates_ranks_upscales_and_saves_as_the_command(model, runs, home, capfd) -> None:
    rows = model.generate(PROMPTS, num_images_per_prompt=2, seed=7, top_n=1, folder=home / "saved")
    assert records(home / "saved") == records(home / "generated")
    for number, (image,) in enumerate(rows):
        file = Path("samples") / f"{number:04d}" / "00.png"
        assert np.array_equal(pixels(image), pixels(home / "generated" / file))
        assert (home / "saved" / file).read_bytes() == (home / "generated" / file).read_bytes()
    sheet = Path("samples") / "grid.png"
    assert (home / "saved" / sheet).read_bytes() == (home / "generated" / sheet).read_bytes()
    assert "256/256" in capfd.readouterr().err  # codes: 2 prompts, 2 images of 8x8
    with pytest.raises(UserError, match="is not empty"):
        model.generate("红", folder=home / "saved", progress=False)


def test_captions_and_upscales_as_the_command(model, runs, home, capfd) -> None:
    described, magnified = records(home / "described"), records(home / "magnified")
    files = [home / str(record["file"]) for record in described]
    assert model.caption(files, seed=3, progress=False) == [record["caption"] for record in described]
    with Image.open(files[0]) as image:
        assert model.caption(image, seed=3, progress=False) == described[0]["caption"]
    images = model.upscale(files, seed=3, progress=False)
    for record, image in zip(magnified, images, strict=True):
        assert np.array_equal(pixels(home / "magnified" / str(record["file"])), pixels(image))
    assert capfd.readouterr().err == ""


def test_ranks_images(model, home) -> None:
    files = sorted((home / "outputs/generate/latest/samples").glob("*/00.png"))
    ranked = model.rank(PROMPTS[0], files)
    assert [found.caption_loss for found in ranked] == sorted(found.caption_loss for found in ranked)
    assert sorted(found.image for found in ranked) == files
    (alone,) = model.rank(PROMPTS[0], [ranked[-1].image])
    assert alone.caption_loss == pytest.approx(ranked[-1].caption_loss, rel=1e-4)


def test_a_folder_of_any_task(home) -> None:
    captioner = CogView.load(home / "outputs/caption/latest", "cpu")
    file = home / "outputs/generate/latest/samples/0000/00.png"
    assert isinstance(captioner.caption(file, progress=False), str)
    with pytest.raises(UserError, match=r"^path: this needs a model of task=pretrain"):
        captioner.generate("红")
    with pytest.raises(UserError, match=r"^upscale_with: this needs a model of task=super_resolution"):
        captioner.upscale(file)
    newest = CogView.load(device="cpu", outputs=home / "outputs")
    with pytest.raises(UserError, match=r"^rerank_with: this needs a model of task=caption"):
        newest.generate("红", top_n=1)
    with pytest.raises(UserError, match="num_images_per_prompt=0 must be a whole number"):
        newest.generate("红", num_images_per_prompt=0)
    with pytest.raises(UserError, match=r"images: /nowhere\.png: file not found"):
        captioner.caption("/nowhere.png")


def test_defaults_are_those_of_the_command_line() -> None:
    config = composed("task=generate")
    defaults = CogView.generate.__kwdefaults__
    for name in ("num_images_per_prompt", "top_n", "seed", "font"):
        assert defaults[name] == getattr(config, name), name
    assert (defaults["sampling"] or Sampling()) == config.sampler
    assert CogView.load.__func__.__kwdefaults__["verify"] == config.verify
    assert CogView.load.__func__.__kwdefaults__["quantization"] == config.quantization
    assert CogView.load.__func__.__kwdefaults__["outputs"] == config.outputs
    assert config.precision["precision"] == "32-true"
    assert CogView.load.__func__.__kwdefaults__["dtype"] == torch.float32


def test_import_is_light_and_the_version_is_that_of_the_project() -> None:
    code = "import sys, cogview_pl; print(cogview_pl.__version__, 'torch' in sys.modules, 'CogView' in dir(cogview_pl))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [cogview_pl.__version__, "False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        cogview_pl.other  # noqa: B018


def test_the_snippet_of_the_readme_works(cli, home, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "CogView.load" in block)
    (tmp_path / "outputs").symlink_to(home / "outputs")
    (tmp_path / "photo.jpg").symlink_to(home / "outputs/generate/latest/samples/0000/00.png")
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    ended = cli.run_script(script, tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert len(list((tmp_path / "circles" / "samples").rglob("0?.png"))) == 2
