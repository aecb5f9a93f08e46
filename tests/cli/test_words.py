"""Texts and paths on the command line, and in lists of samples, mean what was typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ODD_FOLDER = "it's (a) b=c, ~红 [x] $y"
SEPARATORS = "\u2028\u2029\x85\x0b\x1c"
ODD_PROMPT = f"红色{SEPARATORS}圆形"
PROMPTS = {
    "apostrophe": ("[a dog's ball]", ["a dog's ball"]),
    "exclamation": ("[a big cat!]", ["a big cat!"]),
    "parentheses": ("[a (big) cat, :(]", ["a (big) cat", ":("]),
    "equals": ("[a=b,红=蓝]", ["a=b", "红=蓝"]),
    "quotes": ("""[a "big" 'red' “cat”]""", ["""a "big" 'red' “cat”"""]),
    "quoted_comma": ("""['红色, 大的', "it's, ok"]""", ["红色, 大的", "it's, ok"]),
    "dollars": (r"[$5 \ ${seed}, $HOME]", [r"$5 \ ${seed}", "$HOME"]),
    "numbers": ("[1e3,007,true,null,1_0]", ["1e3", "007", "true", "null", "1_0"]),
    "plain": ("红色的圆形", ["红色的圆形"]),
    "plain_comma": ("red, blue", ["red, blue"]),
    "plain_number": ("1e3", ["1e3"]),
    "file": ("~/my prompts.txt", [ODD_PROMPT, "蓝色"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, chain) -> Path:
    root = tmp_path_factory.mktemp("words")
    (root / "my prompts.txt").write_text(f"{ODD_PROMPT}\n蓝色\n", encoding="utf-8")
    (root / ODD_FOLDER).mkdir()
    (root / ODD_FOLDER / "model").symlink_to(chain.run_folder("pretrain") / "model")
    return root


@pytest.fixture(scope="module")
def runs(cli, chain, home, tmp_path_factory) -> dict[str, object]:
    """Runs of all commands in one process; `~` is the folder in which they are called."""
    generate = ("task=generate", "threads=1")
    model = f"init_from={chain.run_folder('pretrain')}"
    commands = {name: (*generate, model, f"prompts={typed}", f"run_dir={name}") for name, (typed, _) in PROMPTS.items()}
    commands |= {
        "paths": (*generate, f"init_from=~/{ODD_FOLDER}", "prompts=红", f"run_dir={ODD_FOLDER}/run"),
        "read_back": ("task=rerank", f"rerank_with={chain.run_folder('caption')}", "pairs=~/file", "run_dir=read_back"),
        "resumed": (*generate, model, "prompts=~/my prompts.txt", "resume=file"),
        "resumed_by_name": ("resume=dollars",),
        "sweep": ("-m", *generate, model, "prompts=[a,b],it's", "outputs=~/swept"),
    }
    ended = cli.run_many([(words, home) for words in commands.values()], tmp_path_factory.mktemp("cases"))
    return dict(zip(commands, ended, strict=True))


def prompts_of(run: Path) -> list[str]:
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["prompt"] for line in lines]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_the_texts_that_were_typed(name: str, runs, home) -> None:
    assert runs[name].code == 0, runs[name].stderr[-3000:]
    meant = PROMPTS[name][1]
    assert prompts_of(home / name) == meant
    assert f"{len(meant)} prompt{'s' if len(meant) > 1 else ''}: " in runs[name].stdout


def test_paths_may_hold_any_sign_and_home(runs, home) -> None:
    assert runs["paths"].code == 0, runs["paths"].stderr[-3000:]
    assert prompts_of(home / ODD_FOLDER / "run") == ["红"]


def test_samples_with_any_prompt_are_read_back(runs, home) -> None:
    for name in ("read_back", "resumed", "resumed_by_name"):
        assert runs[name].code == 0, runs[name].stderr[-3000:]
    assert sorted(prompts_of(home / "read_back")) == sorted(prompts_of(home / "file")) == sorted([ODD_PROMPT, "蓝色"])
    # a reader that splits lines as str.splitlines does reads the same list
    assert len((home / "file" / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_a_sweep_over_prompts(runs, home) -> None:
    assert runs["sweep"].code == 0, runs["sweep"].stderr[-3000:]
    found = [prompts_of(run) for run in (home / "swept" / "generate").glob("*_sweep/prompts=*")]
    assert sorted(found) == [["a", "b"], ["it's"]]
