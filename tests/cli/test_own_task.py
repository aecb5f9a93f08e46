"""The tutorial docs/write-your-own-task.md, as it is written there: a task of one's own is one YAML file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cogview_pl.checkpoints.model_folder import load_sequence_model
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.vocab import TextTokenizer

from ..toy_world.toy_images import toy_images

TUTORIAL = Path(__file__).parents[2] / "docs" / "write-your-own-task.md"


def block(language: str) -> str:
    """The first code block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def home(cli, chain, tmp_path_factory) -> Path:
    """A folder with the chain's outputs, the tutorial's YAML file and 24 of its images."""
    home = tmp_path_factory.mktemp("own_task")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    (home / "my_conf" / "task").mkdir(parents=True)
    (home / "my_conf" / "task" / "counting.yaml").write_text(block("yaml"), encoding="utf-8")
    snippet = block("python").replace("2000", "24")
    subprocess.run([sys.executable, "-c", snippet], cwd=home, env=cli.environment, check=True, timeout=120)
    return home


def test_the_tutorial_works(cli, home: Path, tiny) -> None:
    steps = [line.removeprefix("python -m cogview_pl.run ").split() for line in block("bash").splitlines()]
    cli.succeed([*steps[0], *(key for key in tiny if not key.startswith(("data.train_size", "data.val_size")))], home)
    run = (home / "outputs" / "counting" / "latest").resolve()
    assert load_sequence_model(run).template.target.name == "text"
    text = TextTokenizer.load(run / "tokens" / "text.model")
    store = TokenStore.open(run / "tokens" / "token_store")
    toy = toy_images("train", 24, seed=5)
    for split in ("train", "val"):
        rows = store.split(split)
        for i, key in enumerate(rows.keys()):
            number = len(toy.scene(int(Path(key).stem)).objects)
            assert text.decode(rows[i][0]["text"]) == "一二三"[number - 1] + "个图形"
    cli.succeed(steps[1], home)
    written = (home / "outputs" / "generate" / "latest" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(written) == 24 and all("caption" in json.loads(line) for line in written)
