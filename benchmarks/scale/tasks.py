"""Tasks that work through images: tiny models with random weights, images of 32 pixels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from PIL import Image

from benchmarks.scale.measure import Subject

_SIZES = (100, 1_000, 10_000)
_EDGE = 32
_PROMPT = "红色的圆形"
_TINY = (
    f"image_tokenizer.image_size={_EDGE}",
    "image_tokenizer.hidden_size=8",
    "image_tokenizer.codebook_size=64",
    "text.max_length=8",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=1",
)
_ROLES = {"generator": "pretrain", "captioner": "caption", "upscaler": "super_resolution"}


def _make(folder: Path, count: int) -> None:
    """Three models, images that are one file by many names, and lists of prompts and pairs."""
    from benchmarks.random_runs import make_model, make_tokens

    for role, task in _ROLES.items():
        make_tokens(folder / role, [f"task={task}", *_TINY])
        make_model(folder / role, [f"task={task}", *_TINY])
    images = folder / "images"
    images.mkdir()
    pixels = torch.randint(256, (_EDGE, _EDGE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first = images / "0.png"
    Image.fromarray(pixels.numpy()).save(first)
    for number in range(1, count):
        os.link(first, images / f"{number}.png")
    (folder / "prompts.txt").write_text(f"{_PROMPT}\n" * count, encoding="utf-8")
    pairs = (json.dumps({"prompt": _PROMPT, "file": f"images/{number}.png"}) + "\n" for number in range(count))
    (folder / "pairs.jsonl").write_text("".join(pairs), encoding="utf-8")


def _run(folder: Path, *words: str) -> None:
    from cogview_pl.run import run

    run(*words, f"run_dir={folder / 'run'}", "threads=1", "plan.strict=false")


def _model(folder: Path, role: str) -> Path:
    return folder / role / "pretrain" / "latest"


def _generate(folder: Path, count: int) -> None:
    _run(folder, "task=generate", f"init_from={_model(folder, 'generator')}", f"prompts={folder / 'prompts.txt'}")


def _caption(folder: Path, count: int) -> None:
    _run(folder, "task=generate", f"init_from={_model(folder, 'captioner')}", f"images={folder / 'images'}")


def _rerank(folder: Path, count: int) -> None:
    _run(folder, "task=rerank", f"rerank_with={_model(folder, 'captioner')}", f"pairs={folder / 'pairs.jsonl'}")


def _magnify(folder: Path, count: int) -> None:
    _run(folder, "task=magnify", f"upscale_with={_model(folder, 'upscaler')}", f"images={folder / 'images'}")


def _warm_up() -> None:
    """Import what the tasks need."""
    import cogview_pl.tasks.generate
    import cogview_pl.tasks.magnify
    import cogview_pl.tasks.rerank  # noqa: F401


SUBJECTS = tuple(
    Subject(name, "images", _SIZES, _make, work, _warm_up)
    for name, work in (("generate", _generate), ("caption", _caption), ("rerank", _rerank), ("magnify", _magnify))
)
