"""task=tokenize in parts: however its processes start, and though one is killed, the store is that of one process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from cogview_pl.checkpoints.model_folder import ImageTokenizer, build_vqvae, save_image_tokenizer
from cogview_pl.data.token_store.store import TokenStore
from tests.make_models import quantizer_options

from ..checkpoints import saved

VQVAE = {**saved.VQVAE, "quantizer": quantizer_options("fixed")}


@pytest.fixture(scope="module")
def tokenize(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that tokenise 90 images in batches of 4."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_image_tokenizer(home / "images", ImageTokenizer(build_vqvae(VQVAE), {**VQVAE, "image_size": 64}))
    sizes = ["data.train_size=80", "data.val_size=10", "data.batch_size=4", "token_store.commit_seconds=0"]
    return ["task=tokenize", f"image_tokenizer.path={home / 'images'}", *sizes, "threads=1"]


@pytest.fixture(scope="module")
def one(cli, tokenize, tmp_path_factory) -> Path:
    """The run of one process."""
    home = tmp_path_factory.mktemp("one")
    cli.succeed([*tokenize, "run_dir=one"], home)
    return home / "one"


def require_joined(run: Path, one: Path) -> None:
    """The joined store has every byte of the store of one process, and the run its metrics."""
    found, wanted = run / "token_store", one / "token_store"
    for name in ("header.json", "train.keys.txt", "train.crc32", "val.keys.txt", "val.crc32"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    for split in ("train", "val"):
        pieces = sorted(found.glob(f"{split}.*-of-*.bin"))
        assert b"".join(piece.read_bytes() for piece in pieces) == (wanted / f"{split}.bin").read_bytes()
    assert TokenStore.open(found).fingerprint() == TokenStore.open(wanted).fingerprint()
    for name in ("text.model", "image_tokenizer/weights.safetensors"):
        assert (run / name).read_bytes() == (one / name).read_bytes(), name
    assert metrics(run) == metrics(one)


def metrics(run: Path) -> dict[str, float]:
    found = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("perf/")}


@pytest.mark.slow
def test_four_runs_of_which_one_is_killed_are_the_run_of_one_process(cli, tokenize, one, tmp_path) -> None:
    words = [*tokenize, "token_store.parts=4"]
    process = cli.start([*words, "token_store.part=2", "run_dir=part2"], tmp_path)
    rows = tmp_path / "part2" / "token_store" / "train.bin"
    while not (rows.exists() and rows.stat().st_size) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    for number in (4, 1, 3):
        cli.succeed([*words, f"token_store.part={number}", f"run_dir=part{number}"], tmp_path)
    refused = cli.run(["task=tokenize", "token_store.join=[part3,part1]", "run_dir=joined"], tmp_path)
    assert refused.code == 2 and refused.stderr.endswith(
        "of the 4 parts of part3/token_store and others, 2, 4 are missing; finish its run, and name its folder too\n"
    )
    assert not (tmp_path / "joined").exists()
    cli.succeed([*words, "token_store.part=2", "run_dir=part2", "resume=auto"], tmp_path)
    cli.succeed(["task=tokenize", "token_store.join=[part1,part2,part3,part4]", "run_dir=joined"], tmp_path)
    require_joined(tmp_path / "joined", one)
    assert not (tmp_path / "outputs" / "tokenize").exists()
    trained = cli.run(["task=pretrain", "data.token_store=part1"], tmp_path)
    assert trained.code == 2 and "holds part 1 of 4 of a token store; join the parts" in trained.stderr


@pytest.mark.slow
@pytest.mark.ddp
def test_processes_of_torchrun_divide_the_parts(cli, tokenize, one, tmp_path) -> None:
    words = [*tokenize, "token_store.parts=3", "trainer.devices=2", "trainer.accelerator=cpu"]
    cases = [[*words, "run_dir=joined"], [*tokenize, "trainer.devices=2", "resume=joined", "token_store.parts=2"]]
    ended, refused = cli.run_on_two([(case, tmp_path) for case in cases], tmp_path)
    assert ended.code == 0, ended.stderr
    require_joined(tmp_path / "joined", one)
    assert refused.code == 2 and "was begun with token_store.parts=3, this run has 2" in refused.stderr


@pytest.mark.slow
def test_jobs_of_submitit_are_joined_by_the_folder_of_their_sweep(cli, tokenize, one, tmp_path) -> None:
    pytest.importorskip("submitit")
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.gpus_per_node=null"]
    sweep = ["-m", *tokenize, "token_store.parts=2", "token_store.part=1,2", "run_dir=sweep", *launcher]
    cli.succeed(sweep, tmp_path)
    cli.succeed(["task=tokenize", "token_store.join=sweep", "run_dir=joined"], tmp_path)
    require_joined(tmp_path / "joined", one)


def test_keys_of_parts_that_do_not_go_together(cli, tokenize, tmp_path) -> None:
    cases = [
        ([*tokenize, "token_store.part=2"], ["token_store.part=2 is none of token_store.parts=null"]),
        ([*tokenize, "token_store.part=3", "token_store.parts=2"], ["token_store.part=3 is none of", "parts=2"]),
        ([*tokenize, "token_store.parts=257"], ["token_store.parts=257 must be a whole number from 1 to 256"]),
        ([*tokenize, "token_store.join=[a]", "token_store.parts=2"], ["leave token_store.part and token_store.parts"]),
        (["task=tokenize", "token_store.join=nowhere"], ["token_store.join: nowhere does not exist; give the run"]),
        (["task=tokenize", "token_store.join=."], ["token_store.join: . holds no token store"]),
        (["task=pretrain", "token_store.parts=2"], ["token_store.parts has no effect on task=pretrain"]),
    ]
    cli.refuse(cases, tmp_path, tmp_path)
