"""The tutorial docs/write-your-own-task.md, word for word: the user's own task, template and data set."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.io import write_png

from cogview_pl.checkpoints.model_folder import load_sequence_model
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.vocab import TextTokenizer

from ..toy_world.toy_images import toy_images
from .tutorial import block


def commands(heading: str) -> list[list[str]]:
    """Arguments of each command in a section."""
    return [line.removeprefix("python -m cogview_pl.run ").split() for line in block(heading, "bash").splitlines()]


def without_toy(tiny: tuple[str, ...]) -> list[str]:
    """Keys of a tiny run, without keys of the toy world."""
    return [key for key in tiny if not key.startswith(("data.train_size", "data.val_size"))]


@pytest.fixture(scope="module")
def home(cli, chain, tmp_path_factory) -> Path:
    """A folder with the outputs of the chain, the files of the tutorial, and 24 images."""
    home = tmp_path_factory.mktemp("own_task")
    shutil.copytree(chain.home / "outputs", home / "outputs", symlinks=True)
    for folder, heading, name in (
        ("task", "The file", "counting"),
        ("template", "Several texts", "question_answer"),
        ("data", "Your own data set", "stripes"),
    ):
        (home / "my_conf" / folder).mkdir(parents=True)
        (home / "my_conf" / folder / f"{name}.yaml").write_text(block(heading, "yaml"), encoding="utf-8")
    (home / "my_data.py").write_text(block("Your own data set", "python"), encoding="utf-8")
    snippet = block("Images to try it on", "python").replace("2000", "24")
    subprocess.run([sys.executable, "-c", snippet], cwd=home, env=cli.environment, check=True, timeout=120)
    return home


def test_the_tutorial_works(cli, home: Path, tiny) -> None:
    steps = commands("The file")
    cli.succeed([*steps[0], *without_toy(tiny)], home)
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


@pytest.mark.slow
def test_two_texts_are_read_from_two_columns(cli, home: Path, tiny, tmp_path: Path) -> None:
    questions = home / "questions"
    questions.mkdir()
    texts = {f"{i}.png": (f"第{i}个问题", f"回答{i}") for i in range(12)}
    rows = [{"file_name": file, "question": question, "answer": answer} for file, (question, answer) in texts.items()]
    for i in range(12):
        write_png(toy_images("train", 12)[i].image, str(questions / f"{i}.png"))
    (questions / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (step,) = commands("Several texts")
    cli.succeed([*step, *without_toy(tiny), "data.val_fraction=0.3", "run_dir=asked"], home)
    run = home / "asked"
    text = TextTokenizer.load(run / "tokens" / "text.model")
    store = TokenStore.open(run / "tokens" / "token_store")
    assert store.header.text_fields == ("question", "answer")
    found = {}
    for split in ("train", "val"):
        stored = store.split(split)
        for i, key in enumerate(stored.keys()):
            found[key] = tuple(text.decode(stored[i][0][field]) for field in ("question", "answer"))
    assert found == texts
    template = load_sequence_model(run).template
    assert [slot.name for slot in template.slots] == ["image", "question", "answer"]
    assert template.target.name == "answer"
    asked = ["--config-dir", "my_conf", "task=caption", "template=question_answer", "text.max_length=24"]
    pair = "template.layout='[ROI1] {text} [BASE] [BOI1] {one:8x8} [EOI1] [BOI2] {two:4x4} [EOI2]'"
    cli.refuse(
        [
            (asked, ["template.layout", "no text for slot question", "text", "task=tokenize"]),
            (
                [*asked, "sequences.source=images"],
                ["toy_train_0_00000000 has no text question, a slot of template.layout"],
            ),
            (
                [*step, "data.root=counts"],
                ["metadata.jsonl:1 has no field question", "template.layout", "file_name, count"],
            ),
            (["task=generate", "init_from=asked", "images=counts"], ["does not write one text about one image"]),
            (
                ["task=pretrain", pair, "template.target=two"],
                ["template.layout", "image slots one, two", "super-resolution"],
            ),
        ],
        home,
        tmp_path,
    )


@pytest.mark.slow
def test_a_data_set_of_the_users_own(cli, home: Path, tiny, tmp_path: Path) -> None:
    for step in commands("Your own data set"):
        cli.succeed([*step, *without_toy(tiny), "data.count=40"], home)
    tokens = home / "outputs" / "tokenize" / "latest"
    store, text = TokenStore.open(tokens / "token_store"), TextTokenizer.load(tokens / "text.model")
    rows = store.split("train")
    assert rows.keys() == [f"train-{i}" for i in range(40)] and len(store.split("val")) == 8
    assert [text.decode(rows[i][0]["text"]) for i in range(5)] == [f"{n}条白色条纹" for n in (1, 2, 3, 4, 1)]
    assert all((rows[i][1] == rows[i + 4][1]).all() for i in range(4))
    mine = ["--config-dir", "my_conf", "task=vqvae", "data=stripes"]
    cli.refuse(
        [
            ([*mine, "+data.colour=red"], ["data._target_=my_data.Stripes", "unexpected keyword argument 'colour'"]),
            ([*mine, "~data.count"], ["data._target_=my_data.Stripes", "missing a required argument: 'count'"]),
            ([*mine, "data._target_=my_data.Dots"], ["data._target_=my_data.Dots", "cannot be imported"]),
            ([*mine, "data._target_=torch.nn.Linear"], ["data._target_=torch.nn.Linear", "CaptionedImages"]),
            ([*mine, "data.batch_size=many"], ["data.batch_size", "many"]),
            ([*mine, "data.batch_size=0"], ["data.batch_size=0 must be"]),
            (["task=vqvae", "data=base"], ["data._target_ has no value"]),
        ],
        home,
        tmp_path,
    )
