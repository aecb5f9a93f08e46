"""task=features and task=evaluate: known metrics, the protocol, comparisons; mistakes end in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.models import vgg16

from ..evaluation.fixed import fixed_values, fixed_weights
from ..evaluation.hostile import hostile_archive

SMALL_FEATURES = ("features.epochs=1", "features.hidden_size=4", "data.train_size=64", "data.val_size=16", "threads=1")
MEASURED = ("data.val_size=8", "evaluate.is_splits=2", "threads=1")
ON_PAIRS = ("task=evaluate", "pairs=outputs/generate/latest", *MEASURED)
RUNS = {
    "features": ["task=features", *SMALL_FEATURES],
    "caption": ["task=caption"],
    "pairs": [*ON_PAIRS, "run_dir=pairs"],
    "again": [*ON_PAIRS, "run_dir=again"],
    "rerank": ["task=rerank", "pairs=outputs/generate/latest", "run_dir=rerank"],
    "generated": [
        "task=evaluate",
        *MEASURED,
        "num_prompts=3",
        "num_images_per_prompt=2",
        "seed=5",
        "run_dir=generated",
    ],
    "images": [
        *("task=evaluate", "images=images", "evaluate.reference=images", "evaluate.metrics=[fid]", *MEASURED),
        "run_dir=of_images",
    ],
    "missing": ["task=evaluate", "pairs=some.jsonl", "evaluate.metrics=[toy,style]", *MEASURED, "run_dir=missing"],
    "reconstruction": [
        *("task=evaluate", "evaluate.metrics=[reconstruction]", "evaluate.lpips=[vgg16.pth,linear.pth]", *MEASURED),
        "run_dir=reconstruction",
    ],
    "compare": ["task=evaluate", "evaluate.compare=[pairs,again]", "run_dir=compare"],
}

MISTAKES: list[tuple[list[str], list[str]]] = [
    (["task=features", "data.styles=[flat]"], ["data.styles", "two or more"]),
    ([*ON_PAIRS, "evaluate.metrics=[fid,fjd]"], ["evaluate.metrics", "'fjd'", "caption_loss", "reconstruction"]),
    ([*ON_PAIRS, "outputs=nowhere"], ["evaluate.features", "task=features"]),
    ([*ON_PAIRS, "evaluate.features=nowhere.pt"], ["evaluate.features=nowhere.pt"]),
    (
        [*ON_PAIRS, "evaluate.features=flat.pt", "evaluate.resolution=8", "evaluate.trust_features=true"],
        ["evaluate.features=flat.pt", "features (B, F)"],
    ),
    ([*ON_PAIRS, "evaluate.features=inception_v3.pt"], ["evaluate.features=inception_v3.pt", "trust_features=true"]),
    ([*ON_PAIRS, "evaluate.features=linear.pth"], ["evaluate.features=linear.pth", "fc.weight is missing"]),
    ([*ON_PAIRS, "evaluate.features=outputs/vqvae/latest"], ["kind image_tokenizer", "task=features"]),
    ([*ON_PAIRS, "evaluate.lpips=[vgg16.pth]"], ["evaluate.lpips", "give two"]),
    (
        [*ON_PAIRS, "evaluate.lpips=[linear.pth,vgg16.pth]"],
        ["evaluate.lpips=linear.pth", "features.0.weight is missing"],
    ),
    (
        [*ON_PAIRS, "evaluate.lpips=[vgg16.pth,linear.pth]", "evaluate.metrics=[fid]"],
        ["evaluate.lpips", "add reconstruction"],
    ),
    ([*ON_PAIRS, "evaluate.base_style=fresco"], ["evaluate.base_style=fresco", "ink"]),
    ([*ON_PAIRS, "evaluate.reference=nowhere"], ["evaluate.reference=nowhere"]),
    ([*ON_PAIRS, "evaluate.is_splits=10"], ["is needs 10", "4 can be read"]),
    ([*ON_PAIRS, "data.image_size=32"], ["data.image_size=32", "64"]),
    ([*ON_PAIRS, "rerank_with=outputs/pretrain/latest"], ["layout", "task=caption"]),
    ([*ON_PAIRS, "prompts=[红色]"], ["pairs and prompts"]),
    (["task=evaluate", "images=images"], ["caption_loss", "images=images", "pairs"]),
    (["task=evaluate", "pairs=nowhere"], ["pairs=nowhere"]),
    (["task=evaluate", "pairs=gone.jsonl", "evaluate.metrics=[toy]"], ["toy needs 1", "0 can be read"]),
    (["task=evaluate", "pairs=some.jsonl", "evaluate.metrics=[fid]"], ["fid needs 2", "1 can be read"]),
    (["task=evaluate", "pairs=cats.jsonl", "evaluate.metrics=[toy]"], ["toy needs prompts", "2"]),
    (["task=evaluate", "pairs=cats.jsonl", "evaluate.metrics=[style]"], ["style needs prompts", "2"]),
    (["task=evaluate", "pairs=long.jsonl", "evaluate.metrics=[caption_loss]"], ["caption_loss", "text tokens"]),
    (["task=evaluate", "init_from=outputs/caption/latest"], ["task=pretrain"]),
    (["task=evaluate", "evaluate.compare=[pairs,generated]"], ["protocol/generated_images is 4", "6 in generated"]),
]


@dataclass(frozen=True)
class Evaluated:
    """Results of the runs of this file."""

    home: Path
    mistakes: list[Any]
    """Result of each command line of `MISTAKES`."""
    compared: str
    """Output of the comparison."""
    left: set[Path]
    """Run folders that exist after the mistakes."""


@pytest.fixture(scope="module")
def home(evaluated: Evaluated) -> Path:
    return evaluated.home


@pytest.fixture(scope="module")
def evaluated(cli, chain, tiny, tmp_path_factory) -> Evaluated:
    """A folder with the outputs of the chain, images, and all runs of this file, made in one process."""
    home = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    (home / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80, 64), colour).save(home / "images" / f"{number}.png")
    (home / "images" / "damaged.png").write_bytes(b"no image")
    rows = [("中间有一个大的红色圆形", "images/0.png"), ("左边有一个小的蓝色心形的油画图像", "images/gone.png")]
    write_pairs(home / "some.jsonl", rows)
    write_pairs(home / "gone.jsonl", rows[1:])
    write_pairs(home / "cats.jsonl", [("一只猫", "images/0.png")] * 2)
    write_pairs(home / "long.jsonl", [("红色的圆形" * 20, "images/0.png")])
    torch.jit.save(torch.jit.trace(torch.nn.Flatten(2), torch.zeros(2, 3, 8, 8)), str(home / "flat.pt"))
    hostile_archive(home / "inception_v3.pt", Path("written"))
    save_lpips(home)
    styles = OmegaConf.load(home / "outputs" / "vqvae" / "latest" / "config.yaml").data.styles
    runs = {
        **RUNS,
        "caption": [*RUNS["caption"], *tiny],
        "reconstruction": [*RUNS["reconstruction"], f"data.styles={','.join(styles).join('[]')}"],
    }
    left = set(home.glob("outputs/evaluate/*"))
    ended = cli.run_many([(arguments, home) for arguments in (*runs.values(), *(case[0] for case in MISTAKES))], home)
    for name, result in zip(runs, ended, strict=False):
        assert result.code == 0, f"{name}: {result.stderr[-3000:]}"
    compared = ended[list(runs).index("compare")].stdout
    return Evaluated(home, ended[len(runs) :], compared, set(home.glob("outputs/evaluate/*")) - left)


def save_lpips(home: Path) -> None:
    """The two files of LPIPS."""
    with torch.device("meta"):
        network = torch.nn.ModuleDict({"features": vgg16(weights=None, init_weights=False).features})
    torch.save(fixed_weights(network), home / "vgg16.pth")
    sizes = enumerate((64, 128, 256, 512, 512))
    torch.save({f"lin{i}.model.1.weight": fixed_values((1, size, 1, 1), i) for i, size in sizes}, home / "linear.pth")


def write_pairs(file: Path, rows: list[tuple[str, str]]) -> None:
    file.write_text("".join(json.dumps({"prompt": p, "file": f}, ensure_ascii=False) + "\n" for p, f in rows))


def metrics(run: Path) -> dict[str, float | str]:
    return json.loads((run / "metrics.json").read_text())


def test_every_metric_and_its_protocol(home: Path) -> None:
    found = metrics(home / "pairs")
    measured = {f"eval/fid_{radius}" for radius in (0, 1, 2, 4, 8)} | {"eval/rfid", "eval/is", "eval/ssim"}
    toy = {f"toy/{name}_accuracy" for name in ("colour", "shape", "size", "place", "style")}
    assert measured | toy <= found.keys()
    assert found["protocol/blur_radii"] == "0,1,2,4,8"
    assert (found["protocol/generated_images"], found["protocol/reference_images"]) == (4, 8)
    assert found["protocol/resolution"] == 64
    for name in ("features", "reference", "prompts", "captioner"):
        assert len(str(found[f"protocol/{name}_sha256"])) == 64
    assert all(isinstance(value, float | int | str) for value in found.values())


def test_reconstruction_agrees_with_the_training_run(home: Path) -> None:
    trained = metrics(home / "outputs" / "vqvae" / "latest")
    found = metrics(home / "reconstruction")
    for name in ("eval/psnr", "codebook/usage", "codebook/perplexity"):
        assert found[name] == pytest.approx(trained[name], rel=1e-5)
    assert float(found["eval/lpips"]) > 0
    assert len(str(found["protocol/lpips_sha256"])) == 2 * 64 + 1


def test_judges_agree_with_generate_and_rerank(home: Path) -> None:
    found = metrics(home / "pairs")
    generated = metrics(home / "outputs" / "generate" / "latest")
    for name in ("toy/colour_accuracy", "toy/shape_accuracy", "toy/place_accuracy", "toy/all_right"):
        assert found[name] == generated[name]
    assert found["eval/caption_loss"] == pytest.approx(metrics(home / "rerank")["rerank/caption_loss"], rel=1e-5)


def test_equal_runs_have_equal_numbers(home: Path) -> None:
    first, second = (
        {key: value for key, value in metrics(home / name).items() if not key.startswith("perf/")}
        for name in ("pairs", "again")
    )
    assert first == second


def test_generates_first_where_nothing_is_given(home: Path) -> None:
    found = metrics(home / "generated")
    assert len((home / "generated" / "samples.jsonl").read_text().splitlines()) == 6
    assert (home / "generated" / "samples" / "0002" / "01.png").exists()
    assert found["protocol/generated_images"] == 6
    assert found["protocol/sampler_top_k"] == 200 and found["protocol/num_images_per_prompt"] == 2
    assert found["protocol/seed"] == 5


def test_images_without_prompts_against_themselves(home: Path) -> None:
    found = metrics(home / "of_images")
    assert found["eval/fid_0"] == pytest.approx(0, abs=1e-6)
    assert (found["protocol/generated_images"], found["protocol/reference_images"]) == (3, 3)
    assert "protocol/prompts_sha256" not in found
    skipped = (home / "of_images" / "skipped.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["key"]).name for line in skipped] == ["damaged.png"]


def test_missing_images_are_listed(home: Path) -> None:
    found = metrics(home / "missing")
    assert found["protocol/generated_images"] == 1 and found["toy/count"] == 1
    (line,) = (home / "missing" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"].endswith("gone.png")


def test_comparison_of_equal_protocols(home: Path, evaluated: Evaluated) -> None:
    found = metrics(home / "compare")
    assert found["difference/eval/fid_0"] == 0
    assert found["first/eval/psnr"] == metrics(home / "pairs")["eval/psnr"]
    assert "eval/psnr" in evaluated.compared


def test_mistakes(evaluated: Evaluated) -> None:
    for ended, (arguments, words) in zip(evaluated.mistakes, MISTAKES, strict=True):
        assert ended.code == 2, f"{arguments}: {ended.stderr[-2000:]}"
        assert ended.stderr.startswith("cogview_pl: ") and ended.stderr.count("\n") == 1
        for word in words:
            assert word in ended.stderr, (arguments, ended.stderr)
    assert evaluated.left == set()
    assert not (evaluated.home / "written").exists()
