"""task=features on captioned images: its metrics and folder, who takes the network, and mistakes in one line."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

COLOURS = {"红色": "red", "绿色": "lime", "蓝色": "blue", "白色": "white"}
DATA = ("data=folder", "data.root=pictures", "data.image_size=32", "data.val_fraction=0.25", "data.batch_size=8")
FEW = ("threads=1", "data.num_workers=0", "features.hidden_size=4", "features.num_features=8", "features.lr=2e-2")
FEATURES = ("task=features", *DATA, *FEW, "features.epochs=6", "features.blur=0.5")
METRICS = ("task=evaluate", "images=pictures", *DATA, "threads=1", "evaluate.reference=pictures")
RUNS = {
    "first": (*FEATURES, "run_dir=first"),
    "second": (*FEATURES, "run_dir=second"),
    "fid": (*METRICS, "evaluate.metrics=[fid]", "evaluate.features=first", "run_dir=fid"),
}
MISTAKES: list[tuple[tuple[str, ...], list[str]]] = [
    (
        ("task=features", *DATA, "features.terms.min_share=0.9"),
        ["features.terms", "data.caption_field"],
    ),
    (("task=features", *DATA, "data.image_size=8"), ["data.image_size=8", "16 pixels"]),
    (("task=features", *DATA, "data.val_fraction=0"), ["validation split has no images", "data.val_fraction"]),
    (("task=features", *DATA, "data.root=damaged"), ["cannot be used", "data.max_skipped_share"]),
    (("task=features", "features.terms.longest=1"), ["features.terms.longest", "data=toy"]),
    (("task=features", *DATA, "data.train_size=9"), ["data.train_size"]),
    ((*METRICS, "evaluate.metrics=[is]", "evaluate.features=first"), ["evaluate.features=first", "leave is out"]),
    (
        ("task=evaluate", "pairs=pairs.jsonl", "evaluate.metrics=[style]", "evaluate.features=first"),
        ["evaluate.features=first", "task=features data=toy", "leave style out"],
    ),
]


@dataclass(frozen=True)
class Trained:
    """Results of the runs of this file."""

    home: Path
    ended: dict[str, Any]
    mistakes: list[Any]


@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory) -> Trained:
    home = tmp_path_factory.mktemp("features")
    rows = write_pictures(home / "pictures")
    (home / "damaged").mkdir()
    (home / "damaged" / "captions.jsonl").write_bytes((home / "pictures" / "captions.jsonl").read_bytes())
    for number, row in enumerate(rows):
        file = home / "damaged" / row["file_name"]
        file.write_bytes((home / "pictures" / row["file_name"]).read_bytes() if number % 3 else b"no image")
    (home / "pairs.jsonl").write_text(json.dumps({"prompt": "红色", "file": "pictures/00.png"}))
    commands = [*RUNS.values(), *(given for given, _ in MISTAKES)]
    ended = cli.run_many([(list(given), home) for given in commands], home)
    results = dict(zip(RUNS, ended, strict=False))
    for name, result in results.items():
        assert result.code == 0, f"{name}: {result.stderr[-3000:]}"
    return Trained(home, results, ended[len(RUNS) :])


def write_pictures(folder: Path) -> list[dict[str, str]]:
    """Pictures of two colours, with captions that name them."""
    folder.mkdir()
    rows = []
    for number in range(48):
        (left, fill), (right, other) = (list(COLOURS.items())[number // step % 4] for step in (1, 4))
        image = Image.new("RGB", (32, 32), fill)
        image.paste(other, (16, 0, 32, 32))
        image.save(folder / f"{number:02}.png")
        rows.append({"file_name": f"{number:02}.png", "text": f"{left}的左边，{right}的右边"})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")
    return rows


def metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def test_it_finds_the_terms_of_validation_images(trained: Trained) -> None:
    found = metrics(trained.home / "first")
    assert found["features/terms_found"] > found["features/terms_found_by_frequency"] + 0.1
    assert found["features/mean_average_precision"] > 0.6
    assert "features/terms_found" in trained.ended["first"].stdout
    with (trained.home / "first" / "model" / "terms.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["term"] for row in rows} == set(COLOURS)  # all other words are in all captions
    assert found["features/terms"] == len(COLOURS)
    shares = [float(row["share"]) for row in rows]
    assert shares == sorted(shares, reverse=True) and max(shares) <= 0.9


def test_equal_seeds_give_equal_numbers(trained: Trained) -> None:
    first, second = (
        {name: value for name, value in metrics(trained.home / run).items() if not name.startswith("perf/")}
        for run in ("first", "second")
    )
    assert first == second
    weights = [(trained.home / run / "model" / "weights.safetensors").read_bytes() for run in ("first", "second")]
    assert weights[0] == weights[1]


def test_the_next_command_trains_an_image_tokenizer(trained: Trained) -> None:
    assert "task=vqvae data=folder data.root=pictures" in trained.ended["first"].stdout
    assert "image_tokenizer/perceptual=features image_tokenizer.perceptual.path=" in trained.ended["first"].stdout


def test_fid_takes_the_network(trained: Trained) -> None:
    found = metrics(trained.home / "fid")
    assert found["eval/fid_0"] == pytest.approx(0, abs=1e-3)  # the images are the reference
    assert found["protocol/resolution"] == 32 and len(str(found["protocol/features_sha256"])) == 64


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_end_in_one_line(trained: Trained, number: int) -> None:
    ended, words = trained.mistakes[number], MISTAKES[number][1]
    assert ended.code == 2, ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert line.startswith("cogview_pl: ") and all(word in line for word in words), line
