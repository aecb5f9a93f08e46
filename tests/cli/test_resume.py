"""A run that was killed or stopped, and then resumed, ends exactly like an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cogview_pl.runs.record import RECORD

from .rewound import last_checkpoint, metrics, require_same

STEPS, EVERY = 20, 4
TRAIN = (
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={EVERY}",
    f"callbacks.checkpoint.every_n_train_steps={EVERY}",
    "trainer.log_every_n_steps=1",
    "data.batch_size=8",
    "data.val_size=8",
    "threads=1",
    "plan.strict=false",
    "seed=5",
)
# 40 samples in batches of 8: an epoch ends every 5 steps, checkpoints lie inside epochs.
VQVAE = (
    "task=vqvae",
    *TRAIN,
    "data.train_size=40",
    "image_tokenizer.quantize_after_steps=2",
    "image_tokenizer.quantizer.revive_every=3",
    "image_tokenizer.quantizer.dead_threshold=0.4",
)
TOKENIZE = ("task=tokenize", "data.train_size=200", "data.val_size=16", "data.batch_size=4", "threads=1")
GENERATE = ("task=generate", "num_prompts=4", "num_images_per_prompt=2", "sampler.batch_size=2", "threads=1", "seed=3")
PRETRAIN = ("task=pretrain", *TRAIN, "model.dropout=0.1")


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Step → value; the last value counts if a step was logged before the kill and after it."""
    found: dict[int, float] = {}
    for file in sorted((run / "tensorboard").glob("events.*"), key=lambda file: int(file.name.split(".")[3])):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def require_same_run(one: Path, other: Path, losses: tuple[str, ...]) -> None:
    assert (one / "model" / "weights.safetensors").exists()
    require_same(one, other)
    for tag in losses:
        left, right = scalars(one, tag), scalars(other, tag)
        assert len(left) >= STEPS - 2
        assert left == right


def wait_for(process: subprocess.Popen[str], condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def interrupt(cli, args: tuple[str, ...], home: Path, run: Path, number: signal.Signals) -> tuple[int, str]:
    """Exit code and standard error of a run; all its processes get a signal once it has a checkpoint."""
    process = cli.start([*args, f"run_dir={run}"], home, start_new_session=True)
    wait_for(process, (run / "checkpoints" / "last.ckpt").exists)
    time.sleep(0.2)  # a few more steps, which the resumed run repeats
    os.killpg(process.pid, number)  # a terminal does this for Ctrl-C
    _, stderr = process.communicate(timeout=120)
    assert not (run / "model").exists(), "the run ended before it was interrupted: it needs more steps"
    return process.returncode, stderr


@pytest.mark.parametrize(
    ("task", "workers", "number", "more"),
    [
        ("vqvae", 2, signal.SIGKILL, ()),
        ("pretrain", 2, signal.SIGINT, ()),
        pytest.param("pretrain", 0, signal.SIGTERM, ("activation_checkpointing=block",), marks=pytest.mark.slow),
    ],
)
def test_resumed_training_is_exact(
    task: str, workers: int, number: signal.Signals, more: tuple[str, ...], cli, whole_runs, tmp_path
) -> None:
    args, whole, losses = whole_runs[task]
    run = tmp_path / "run"
    args = (*args, f"data.num_workers={workers}")
    code, stderr = interrupt(cli, args, tmp_path, run, number)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + number
        command = f"{sys.executable} -m cogview_pl.run resume={run}"
        assert f"cogview_pl: stopped by {number.name}; go on with: {command}" in stderr.splitlines()
        assert "Traceback" not in stderr
        assert len(list((run / "checkpoints").iterdir())) == 2  # last.ckpt and the newest of every_n_train_steps
    step = last_checkpoint(run)["global_step"]
    assert EVERY <= step < STEPS
    cli.succeed([*more, f"resume={run}"], tmp_path)
    require_same_run(whole, run, losses)


@pytest.fixture(scope="module")
def whole_runs(cli, chain, tmp_path_factory) -> dict[str, tuple[tuple[str, ...], Path, tuple[str, ...]]]:
    """Task → its arguments, the folder of an uninterrupted run, and the tags to compare."""
    root = tmp_path_factory.mktemp("whole")
    pretrain = (*PRETRAIN, f"data.token_store={chain.run_folder('tokenize')}")
    tokenize = (*TOKENIZE, f"image_tokenizer.path={chain.run_folder('vqvae')}")
    generate = (*GENERATE, f"init_from={chain.run_folder('pretrain')}")
    runs: dict[str, tuple[tuple[str, ...], Path, tuple[str, ...]]] = {
        "tokenize": (tokenize, root / "tokenize", ()),
        "vqvae": (VQVAE, root / "vqvae", ("train/loss_reconstruction", "watch-train/gradient_norm")),
        "pretrain": (pretrain, root / "pretrain", ("train/loss", "train/loss_image")),
        "generate": (generate, root / "generate", ()),
    }
    ended = cli.run_many([([*args, f"run_dir={run}"], root) for args, run, _ in runs.values()], root)
    assert [result.code for result in ended] == [0, 0, 0, 0], ended
    return runs


def test_metrics_survive_two_interrupts_in_a_row(cli, whole_runs, tmp_path) -> None:
    """The second signal comes before the next validation; the values logged before the first one are kept."""
    args, whole, _ = whole_runs["pretrain"]
    args = ["+callbacks.signal._target_=tests.cli.signalling.SignalAt", *args]
    places = {6: ("SIGTERM", f"run_dir={tmp_path / 'run'}"), 7: ("SIGHUP", f"resume={tmp_path / 'run'}")}
    cases = [
        ([*args, place, f"+callbacks.signal.step={step}", f"+callbacks.signal.name={name}"], tmp_path)
        for step, (name, place) in places.items()
    ]
    ended = cli.run_many(cases, tmp_path)
    assert [result.code for result in ended] == [143, 129], ended
    assert "stopped by SIGHUP; go on with" in ended[1].stderr
    last = last_checkpoint(tmp_path / "run")
    assert last["global_step"] == 7
    first_validation = next(iter(scalars(whole, "val/loss").values()))  # after step 4
    assert last["cogview_pl"]["metrics"]["val/loss"] == pytest.approx(first_validation, rel=1e-6)


def test_the_log_goes_on_at_its_step_behind_a_stop_at_a_validation(cli, whole_runs, tmp_path) -> None:
    """From there on Lightning counts one step too many."""
    args, whole, losses = whole_runs["pretrain"]
    run = tmp_path / "run"
    stop = ["+callbacks.signal._target_=tests.cli.signalling.SignalAt", f"+callbacks.signal.step={2 * EVERY}"]
    cases = [([*stop, *args, f"run_dir={run}"], tmp_path), ([*args, f"resume={run}"], tmp_path)]
    ended = cli.run_many(cases, tmp_path)
    assert [result.code for result in ended] == [143, 0], ended
    require_same_run(whole, run, losses)


def test_resumed_tokenisation_is_exact(cli, whole_runs, tmp_path) -> None:
    args, whole, _ = whole_runs["tokenize"]
    process = cli.start([*args, "token_store.commit_seconds=0", "run_dir=killed"], tmp_path)
    rows = tmp_path / "killed" / "token_store" / "train.bin"
    wait_for(process, lambda: rows.exists() and rows.stat().st_size > 0)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    header = json.loads((tmp_path / "killed" / "token_store" / "header.json").read_text())
    assert not header["complete"]
    cli.succeed([*args, "resume=killed"], tmp_path)
    files = sorted(file.name for file in (whole / "token_store").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "killed" / "token_store").iterdir())
    for file in files:
        assert (whole / "token_store" / file).read_bytes() == (tmp_path / "killed" / "token_store" / file).read_bytes()
    assert metrics(whole) == metrics(tmp_path / "killed")


def test_painting_goes_on_where_it_stopped(cli, whole_runs, tmp_path) -> None:
    """Two of four prompts are finished and a third is half written; the others are generated as without the stop."""
    args, whole, _ = whole_runs["generate"]
    runs = {"whole": whole} | {name: tmp_path / name for name in ("stopped", "other", "doubled")}
    lines = (runs["whole"] / "samples.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("stopped", "other", "doubled"):
        shutil.copytree(runs["whole"], runs[name])
        (runs[name] / "metrics.json").unlink()
        (runs[name] / "samples.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
        shutil.rmtree(runs[name] / "samples" / "0003")
    (runs["doubled"] / "samples.jsonl").write_bytes(b"".join([lines[0], lines[0], *lines[2:]]))
    cases = [
        [*args, f"resume={runs['stopped']}"],
        [*args, f"resume={runs['doubled']}"],
        [*args, f"resume={runs['other']}", "seed=4"],
        [*args, f"resume={runs['other']}", "prompts=[红色]"],
        [*args, f"run_dir={runs['other']}"],
    ]
    went_on, repeated, *refused = cli.run_many([(case, tmp_path) for case in cases], tmp_path)
    assert went_on.code == repeated.code == 0, went_on.stderr + repeated.stderr
    assert (runs["doubled"] / "samples.jsonl").read_bytes() == (runs["whole"] / "samples.jsonl").read_bytes()
    files = sorted(file.relative_to(runs["whole"]) for file in runs["whole"].rglob("*") if file.is_file())
    made = sorted(file.relative_to(runs["stopped"]) for file in runs["stopped"].rglob("*") if file.is_file())
    assert [file for file in made if file.name != "config.resumed-2.yaml"] == files
    for file in files:
        if file.name not in (RECORD, "metrics.json"):
            assert (runs["whole"] / file).read_bytes() == (runs["stopped"] / file).read_bytes(), file
    assert metrics(runs["whole"]) == metrics(runs["stopped"])
    for ended, words in zip(refused, ("seed=3, this run has 4", "prompt '", "holds an earlier run"), strict=True):
        assert ended.code == 2 and ended.stderr.count("\n") == 1 and words in ended.stderr


def test_training_that_diverges_names_layer_and_samples(cli, chain, whole_runs, tmp_path) -> None:
    args, _, _ = whole_runs["pretrain"]
    more = ("optimizer.optimizer.lr=1e9", "callbacks.nan_guard.patience=3", f"run_dir={tmp_path / 'run'}")
    (ended,) = cli.run_many([([*args, *more], tmp_path)], tmp_path)
    assert ended.code == 2 and "3 steps in a row had no finite gradient, from step 2 on" in ended.stderr
    found = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert found["step"] == 2 and found["layer"].startswith(("model.", "the gradient of model.", "the loss"))
    keys = (chain.run_folder("tokenize") / "token_store" / "train.keys.txt").read_text().splitlines()
    assert len(found["keys"]) == 8 and set(found["keys"]) <= set(keys)
    assert found["layer"] in ended.stderr and found["keys"][0] in ended.stderr
