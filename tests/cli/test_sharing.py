"""Devices share prompts and images: the same files as one process, and every end is an end of all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

FEW = ("data.train_size=64", "data.val_size=8", "data.batch_size=8", "threads=1", "plan.strict=false")
TWO = "trainer.devices=2"
PROMPTS = "prompts=[红色的圆形,蓝色的心形,一个大的绿色三角形]"


@pytest.fixture(scope="module")
def commands(chain) -> dict[str, list[str]]:
    """Name of a run -> its command line, with more or fewer batches than processes."""
    run = chain.run_folder
    generate = ["task=generate", f"init_from={run('pretrain')}", "seed=5", *FEW]
    captioner, pairs = f"rerank_with={run('caption')}", f"pairs={run('generate')}"
    evaluate = ["task=evaluate", *FEW, "evaluate.is_splits=2", f"evaluate.features={run('features')}", captioner]
    return {
        "three": [*generate, PROMPTS, "num_images_per_prompt=3", "top_n=2", captioner, "sampler.batch_size=3"],
        "at once": [*generate, PROMPTS, "sampler.guidance=1"],
        "one": [*generate, "prompts=[红色]"],
        "captions": ["task=generate", f"init_from={run('caption')}", "num_prompts=5", *FEW, "sampler.batch_size=2"],
        "tokens": ["task=tokenize", f"image_tokenizer.path={run('vqvae')}", *FEW],
        "pairs": ["task=rerank", pairs, captioner, *FEW],
        "found": ["task=rerank", captioner, *FEW, "num_prompts=5", "num_captions=3"],
        "magnified": ["task=magnify", f"upscale_with={run('super_resolution')}", *FEW, "num_prompts=3"],
        "evaluated": [
            *evaluate, f"image_tokenizer.path={run('vqvae')}", f"init_from={run('pretrain')}", "num_prompts=5",
            "data.batch_size=3", "sampler.batch_size=2",
        ],
        "of pairs": [*evaluate, pairs, "evaluate.metrics=[fid,caption_loss,toy]", "data.batch_size=3"],
    }  # fmt: skip


def both(cli, commands, names: Sequence[str], make: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the same runs in one process and in two."""
    one, two = make.mktemp("one"), make.mktemp("two")
    for home, run, more in ((one, cli.run_many, ()), (two, cli.run_on_two, (TWO,))):
        cases = [([*commands[name], *more, f"run_dir={name}"], home) for name in names]
        for ended in run(cases, home):
            assert ended.code == 0, ended.stderr[-4000:]
    return one, two


RUNS, OTHER_RUNS = (
    ("three", "captions", "tokens"),
    ("at once", "one", "pairs", "found", "magnified", "evaluated", "of pairs"),
)


@pytest.fixture(scope="module")
def homes(cli, commands, tmp_path_factory) -> tuple[Path, Path]:
    return both(cli, commands, RUNS, tmp_path_factory)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_write_the_files_of_one(homes: tuple[Path, Path], name: str) -> None:
    require_same_files(*(home / name for home in homes))


@pytest.mark.slow
def test_two_processes_write_the_files_of_one_in_other_tasks(cli, commands, tmp_path_factory) -> None:
    found = both(cli, commands, OTHER_RUNS, tmp_path_factory)
    for name in OTHER_RUNS:
        require_same_files(*(home / name for home in found))


def require_same_files(one: Path, two: Path) -> None:
    """Every file byte for byte, and all metrics but times; config.yaml and the record name the number of devices."""
    assert results(one) == results(two)
    for name in results(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert metrics(one) == metrics(two) and len(metrics(one)) > 0


def results(run: Path) -> list[Path]:
    """Files of a run but those that say how it ran."""
    names = [file.relative_to(run) for file in run.rglob("*") if file.is_file()]
    how = ("metrics.json", ".cogview_pl.json")
    return sorted(name for name in names if name.name not in how and not name.match("config*.yaml"))


def metrics(run: Path) -> dict[str, float]:
    found = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("perf/")}


def started(cli, words: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, as a terminal starts it."""
    environment = cli.environment | variables
    return subprocess.Popen(
        [sys.executable, "-m", "cogview_pl.run", *words], cwd=cwd, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_ctrl_c_ends_all_processes_and_two_devices_go_on(cli, commands, homes, tmp_path) -> None:
    """The first process starts the second one; a terminal sends Ctrl-C to both."""
    words = [*commands["three"], TWO]
    process = started(cli, [*words, "run_dir=run"], tmp_path)
    listed = tmp_path / "run" / "samples.jsonl"
    while not (listed.exists() and listed.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):  # the second process has ended too
        os.killpg(process.pid, 0)
    if process.returncode != 0:  # else it was done before
        assert process.returncode == 130 and said.count("stopped by SIGINT; go on with") == 1, said
        cli.succeed([*words, "resume=run"], tmp_path)
    require_same_files(homes[0] / "three", tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        pytest.param(
            "error", 2, "sample 12 lies on a disk of the second machine; go on with: ", marks=pytest.mark.slow
        ),
        pytest.param("defect", 2, "ZeroDivisionError: a mistake", marks=pytest.mark.slow),
        ("SIGKILL", 2, "cogview_pl: process 1 of the 2 that share this task has died; the memory may be full"),
        pytest.param("SIGTERM", 143, "cogview_pl: stopped by SIGTERM; go on with", marks=pytest.mark.slow),
    ],
)
def test_the_end_of_the_second_process_is_the_end_of_all(cli, commands, tmp_path, kind, code, words) -> None:
    own = ["data._target_=tests.cli.own_images.Misfortune", "data.num_workers=0", TWO, "run_dir=run"]
    process = started(cli, [*commands["tokens"], *own], tmp_path, KIND=kind)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code and words in said, said
    assert said.count("cogview_pl: ") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_an_accelerator_that_is_not_there_is_refused(cli, commands, tmp_path) -> None:
    cases = [
        ([*commands[name], f"trainer.accelerator={accelerator}"], [f"trainer.accelerator={accelerator}", "auto"])
        for name, accelerator in (("one", "gpu"), ("tokens", "mps"), ("pairs", "cuda"), ("found", "quantum"))
    ]
    cases.append((["task=vqvae", "trainer.accelerator=gpu", *FEW], ["trainer.accelerator=gpu"]))
    cases.append(([*commands["one"], TWO, "trainer.num_nodes=2"], ["1 processes were started", "4", "torchrun"]))
    cli.refuse(cases, tmp_path, tmp_path)
    assert not list((tmp_path / "outputs").glob("*/2*"))
