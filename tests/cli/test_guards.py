"""What cannot give the result that was asked for is refused, or said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cogview_pl.config.choices import Verb
from cogview_pl.config.ignored_keys import UNUSED, refuse_ignored_keys
from cogview_pl.errors import UserError

from ..composed import composition

FOLDER = ("data=folder", "data.root=images", "data.val_fraction=0")
VQVAE = (
    "task=vqvae",
    *("threads=1", "data.batch_size=2", "trainer.val_check_interval=4", "image_tokenizer.quantizer.kmeans_iters=1"),
)
NO_VALIDATION = "data: the validation split has no images; set data.val_fraction"
REFUSED = {
    "never_quantized": (
        [*VQVAE, "trainer.max_steps=8", "image_tokenizer.quantize_after_steps=8"],
        ["image_tokenizer.quantize_after_steps=8", "trainer.max_steps=8"],
    ),
    "monitor": (
        [*VQVAE, *FOLDER, "trainer.max_steps=8", "callbacks.checkpoint.monitor=val/loss_reconstruction"],
        ["callbacks.checkpoint.monitor=val/loss_reconstruction", "validation split"],
    ),
    "evaluate": (["task=evaluate", *FOLDER, "evaluate.metrics=[toy]"], [NO_VALIDATION]),
    "reference": (["task=evaluate", *FOLDER, "evaluate.metrics=[reconstruction]"], ["reference images", "0 can be"]),
    "rerank": (["task=rerank", *FOLDER, "num_captions=1"], [NO_VALIDATION]),
    "generate": (["task=generate", *FOLDER], [NO_VALIDATION]),
    "captions": (["task=generate", "init_from=outputs/caption/latest", *FOLDER], [NO_VALIDATION]),
    "magnify": (["task=magnify", *FOLDER], [NO_VALIDATION]),
    "magnify_small": (
        ["task=magnify", "data=folder", "data.root=images", "data.val_fraction=0.5"],
        ["64x64 is smaller than data.min_size=128"],
    ),
    "guidance": (["task=generate", "sampler.guidance=1e38"], ["sampler.guidance=1e+38", "from 0 to 100"]),
    "temperature": (["task=generate", "sampler.temperature=1e-310"], ["sampler.temperature=1e-310", "0, or from 1e-6"]),
    "top_p": (["task=generate", "sampler.top_p=1e-320"], ["sampler.top_p=1e-320", "from 1e-6 to 1"]),
    "nan": (["task=generate", "sampler.temperature=nan"], ["sampler.temperature=nan"]),
    "tokenizer": (
        ["task=generate", "image_tokenizer.path=outputs/vqvae/latest", "prompts=红"],
        ["image_tokenizer.path has no effect on task=generate", "init_from"],
    ),
    "text_model": (["task=generate", "text.model=x", "prompts=红"], ["text.model has no effect on task=generate"]),
    "model_size": (["task=magnify", "model.num_layers=3"], ["model.num_layers has no effect", "upscale_with"]),
    "tokenize_from": (
        ["task=tokenize", "init_from=outputs/vqvae/latest"],
        ["init_from has no effect on task=tokenize", "image_tokenizer.path"],
    ),
    "magnify_from": (["task=magnify", "init_from=outputs/pretrain/latest"], ["init_from has no", "upscale_with"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, chain) -> Path:
    root = tmp_path_factory.mktemp("guards")
    (root / "outputs").symlink_to(chain.home / "outputs")
    (root / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(root / "images" / f"{number:02d}.png")
        (root / "images" / f"{number:02d}.txt").write_text("红色")
    shutil.copytree(root / "images", root / "images_alone", ignore=shutil.ignore_patterns("*.txt"))
    return root


@pytest.fixture(scope="module")
def runs(cli, home, tmp_path_factory):
    """Runs of all commands in one process."""
    toy = ("data.train_size=8", "data.val_size=4")
    guided = ("task=generate", "prompts=红", "sampler.guidance=3", "threads=1")
    commands = {name: args for name, (args, _) in REFUSED.items()} | {
        "shortened": (*VQVAE, *toy, "data.max_val_samples=3", "trainer.max_steps=8", "run_dir=shortened"),
        "used": (*VQVAE, *toy, "trainer.max_steps=4", "image_tokenizer.min_codebook_share=0", "run_dir=used"),
        "no_validation": (*VQVAE, *FOLDER, "trainer.max_steps=4", "run_dir=no_validation"),
        "images_alone": (
            *(*VQVAE, "data=folder", "data.root=images_alone", "data.val_fraction=0.5"),
            *("trainer.max_steps=4", "run_dir=images_alone_run"),
        ),
        "guided": (*guided, "run_dir=guided"),
        "project": ("task=generate", "prompts=红", "model=small", "threads=1", "run_dir=project"),
    }
    ended = cli.run_many([(words, home) for words in commands.values()], tmp_path_factory.mktemp("cases"))
    return dict(zip(commands, ended, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, runs) -> None:
    ended = runs[name]
    assert ended.code == 2, ended.stderr[-3000:]
    assert ended.stderr.startswith("cogview_pl: ") and ended.stderr.count("\n") == 1
    for word in REFUSED[name][1]:
        assert word in ended.stderr


def test_a_short_run_quantizes_most_of_its_steps_and_says_so(runs) -> None:
    assert runs["shortened"].code == 0, runs["shortened"].stderr[-3000:]
    said = "trainer.max_steps=8: the first 2 steps run without quantization instead of 100"
    assert f"{said}; image_tokenizer.quantize_after_steps chooses another number" in runs["shortened"].stdout


def test_a_collapsed_codebook_is_said_at_the_end(runs) -> None:
    said = "  ! the codebook has collapsed: validation images use"
    _, end = runs["shortened"].stdout.split("done: ")
    assert said in end and "Likely cause: only 6 steps trained it; raise trainer.max_steps" in end
    assert runs["used"].code == 0 and said not in runs["used"].stdout


def test_a_validation_that_leaves_out_samples_says_so(runs) -> None:
    said = "validations measure 3 of the 4 samples in the validation split, at equal distances (data.max_val_samples=3;"
    assert runs["shortened"].stdout.count(said) == 1
    assert "validations measure" not in runs["used"].stdout


def test_training_without_validation_images(runs, home) -> None:
    assert runs["no_validation"].code == 0, runs["no_validation"].stderr[-3000:]
    assert runs["no_validation"].stdout.count("the validation split has no samples") == 1
    assert "Total length" not in runs["no_validation"].stderr
    assert (home / "no_validation" / "model" / "weights.safetensors").is_file()
    assert not (home / "no_validation" / "reconstructions.png").exists()


def test_the_image_tokenizer_learns_from_images_without_captions(runs, home) -> None:
    assert runs["images_alone"].code == 0, runs["images_alone"].stderr[-3000:]
    assert json.loads((home / "images_alone_run" / "metrics.json").read_text())["data/skipped"] == 0
    assert (home / "images_alone_run" / "reconstructions.png").is_file()


def test_guidance_of_a_model_without_conditioning_dropout(runs) -> None:
    assert runs["guided"].code == 0, runs["guided"].stderr[-3000:]
    assert "sampler.guidance=3: " in runs["guided"].stdout
    assert "was trained with sequences.conditioning_dropout=0" in runs["guided"].stdout


def test_the_choice_of_a_model_size_may_stay_on_all_command_lines(runs) -> None:
    assert runs["project"].code == 0, runs["project"].stderr[-3000:]


@pytest.mark.parametrize("verb", UNUSED)
def test_every_ignored_key_is_refused_by_name(verb: Verb) -> None:
    names = {"fit_image_tokenizer": "vqvae", "fit_sequence_model": "pretrain", "fit_features": "features"}
    config = composition(f"task={names.get(verb.value, verb.value)}")
    for key in UNUSED[verb]:
        with pytest.raises(UserError, match=rf"^{key} has no effect on task={config.task}.*; leave {key} out$"):
            refuse_ignored_keys(config, ["task=x", f"{key}=1"])
        with pytest.raises(UserError, match=rf"^{key}\.a has no effect"):
            refuse_ignored_keys(config, [f"+{key}.a=1"])
    refuse_ignored_keys(config, ["seed=1", "trainer.max_steps=3", "-m", f"~{next(iter(UNUSED[verb]))}"])
