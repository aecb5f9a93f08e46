"""Image files through the command line: views, remarks and the keys of decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from .conftest import CommandLine

EDGE = 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 images; one has a broken colour profile, one lacks its end marker, one is too large."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        image = Image.new("RGB", (48, 40), (12 * number, 200, 255 - 12 * number))
        icc = b"no profile" * 20 if number == 3 else b""
        image.resize((400, 300) if number == 7 else image.size).save(folder / f"{number:02}.png", icc_profile=icc)
        (folder / f"{number:02}.txt").write_text(f"第{number}张")
    file = folder / "05.png"
    file.write_bytes(file.read_bytes()[:-12])
    return folder


def test_views_are_trained_on_and_tokenised(
    cli: CommandLine, tiny: tuple[str, ...], root: Path, tmp_path: Path
) -> None:
    sizes = [one for one in tiny if not one.startswith(("data.train", "data.val"))]
    data = ["data=folder", f"data.root={root}", "data.val_fraction=0", "data.max_pixels=100_000"]
    views = ["data.crop=random", "data.flip=true", "data.views=2", f"image_tokenizer.image_size={EDGE}"]
    train = ["task=vqvae", *sizes, "trainer.max_steps=3"]
    cases = [
        [*train, *data, *views, "data.val_fraction=0.2", "run_dir=vqvae"],
        ["task=tokenize", *sizes, *data, *views, "image_tokenizer.path=vqvae/model", "run_dir=views"],
        [
            "task=tokenize",
            *sizes,
            *data,
            *views,
            "image_tokenizer.path=vqvae/model",
            "data.crop=pad",
            "data.flip=false",
        ],
        ["task=tokenize", *sizes, *data, *views, "image_tokenizer.path=vqvae/model", "data.crop=middle"],
    ]
    trained, first, same, unknown = cli.run_many([(case, tmp_path) for case in cases], tmp_path)
    assert [trained.code, first.code] == [0, 0], trained.stderr + first.stderr
    run = tmp_path / "views"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tokenize/rows_train"] == 38  # two views of 19 images
    assert metrics["tokenize/skipped"] == 2 and metrics["tokenize/mended"] == 4
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert {one["key"] for one in skipped} == {"07.png", "07.png#2"}
    assert all(one["reason"].startswith("400x300 pixels are more than data.max_pixels=100000") for one in skipped)
    mended = [json.loads(line) for line in (run / "mended.jsonl").read_text().splitlines()]
    assert {one["key"] for one in mended} == {"03.png", "03.png#2", "05.png", "05.png#2"}
    assert "images that were decoded with a remark: 2 × " in first.stdout + first.stderr
    assert same.code == 2 and "data.views=2: all would be the same" in same.stderr
    assert unknown.code == 2 and "crop" in unknown.stderr and unknown.stderr.count("\n") == 1
