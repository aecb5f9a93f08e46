"""`--help`, `--version`, and experiments in the working folder that cannot be read."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from .forked import Ended


@pytest.fixture(scope="module")
def ended(cli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Command lines in a folder with two damaged experiments."""
    home = tmp_path_factory.mktemp("help")
    for name, text in (("broken", "seed: [1\nouts: {"), ("listed", "- seed\n- outputs\n")):
        (home / "experiments" / name).mkdir(parents=True)
        (home / "experiments" / name / "config.yaml").write_text(text)
    commands = {
        "help": ("--help",),
        "version": ("--version", "task=vqvae"),
        "others": ("task=vqvae", "seed=7", "--cfg", "job"),
        "shipped": ("experiment=quickstart", "--cfg", "job"),
        "broken": ("task=vqvae", "experiment=broken"),
        "listed": ("task=vqvae", "experiment=listed"),
    }
    results = cli.run_many([(words, home) for words in commands.values()], home)
    return dict(zip(commands, results, strict=True))


def test_help_lists_groups_and_their_choices(ended) -> None:
    assert ended["help"].code == 0
    lines = ended["help"].stdout.splitlines()
    recipes = "emoji, emoji_128, emoji_finetunes, listed, portraits, portraits_128, quantizers, quickstart"
    released = ", ".join(f"cogview_4b_{task}_lora" for task in ("caption", "style", "super_resolution"))
    assert f"  experiment: broken, {released}, completion, {recipes}, quickstart_lora" in lines
    assert "  image_tokenizer/quantizer: cosine, custom, ema, fixed, fsq, gumbel, learned" in lines
    assert not any("hydra" in line for line in lines)


def test_the_version_is_ours(ended) -> None:
    assert (ended["version"].code, ended["version"].stdout) == (0, f"cogview_pl {version('cogview_pl')}\n")


def test_a_broken_experiment_concerns_only_who_asks_for_it(ended) -> None:
    assert ended["others"].code == 0 and "seed: 7\n" in ended["others"].stdout
    assert ended["shipped"].code == 0 and "task: quickstart\n" in ended["shipped"].stdout
    for name, words in (("broken", "cannot be read"), ("listed", "must hold keys with values")):
        assert ended[name].code == 2 and ended[name].stderr.count("\n") == 1
        file = Path("experiments", name, "config.yaml")
        assert f"experiment={name}: " in ended[name].stderr and f"{file} {words}" in ended[name].stderr
