"""The tutorial's quantizer, from a file in the working folder: it is trained, saved, and loaded by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import TINY
from .tutorial import block

TRAINING = ["task=vqvae", *(key for key in TINY if "kmeans_iters" not in key)]
OWN = ["--config-dir", "my_conf", "image_tokenizer/quantizer=pull"]


@pytest.fixture(scope="module")
def home(cli, tmp_path_factory) -> Path:
    """A folder with the quantizer, its YAML file, and a tokenizer trained with it."""
    home = tmp_path_factory.mktemp("own_quantizer")
    (home / "my_quantizer.py").write_text(block("Your own quantizer", "python"), encoding="utf-8")
    group = home / "my_conf" / "image_tokenizer" / "quantizer"
    group.mkdir(parents=True)
    (group / "pull.yaml").write_text(block("Your own quantizer", "yaml"), encoding="utf-8")
    cli.succeed([*OWN, *TRAINING, "image_tokenizer.quantizer.pull=0.75"], home)
    return home


def test_its_model_folder_holds_its_name_and_arguments(home: Path) -> None:
    written = (home / "outputs" / "vqvae" / "latest" / "model" / "config.yaml").read_text()
    assert "_target_: my_quantizer.Pull" in written and "pull: 0.75" in written


def test_a_later_task_that_names_it_reads_its_codes(cli, home: Path) -> None:
    cli.succeed([*OWN, "task=tokenize", *TINY[5:8]], home)


def test_a_later_task_that_does_not_name_it_imports_nothing(cli, home: Path) -> None:
    ended = cli.run(["task=tokenize", *TINY[5:8]], home)
    assert ended.code == 2 and "names the quantizer 'my_quantizer.Pull', which is not imported" in ended.stderr


@pytest.mark.slow
def test_by_overrides_alone(cli, home: Path) -> None:
    own = ["image_tokenizer/quantizer=custom", "image_tokenizer.quantizer._target_=my_quantizer.Pull"]
    cli.succeed([*TRAINING, *own, "+image_tokenizer.quantizer.pull=0.25", "run_dir=by_overrides"], home)
    assert "pull: 0.25" in (home / "by_overrides" / "model" / "config.yaml").read_text()


MISTAKES = [
    (["image_tokenizer/quantizer=custom"], "image_tokenizer.quantizer._target_ has no value"),
    (["image_tokenizer.quantizer=ema"], "image_tokenizer.quantizer=ema names no class; choose"),
    (["image_tokenizer.quantizer._target_=my_quantizer.Pul"], "_target_=my_quantizer.Pul is no imported subclass"),
    (["image_tokenizer.quantizer._target_=no_file.Mine"], "No module named 'no_file'"),
    ([*OWN, "+image_tokenizer.quantizer.push=1"], "Pull: got an unexpected keyword argument 'push'"),
    (["image_tokenizer.quantizer.dekay=0.5"], "image_tokenizer.quantizer.dekay"),
]


def test_mistakes_are_told_in_one_line(cli, home: Path, tmp_path: Path) -> None:
    cli.refuse([([*given, *TRAINING], [words]) for given, words in MISTAKES], home, tmp_path)
