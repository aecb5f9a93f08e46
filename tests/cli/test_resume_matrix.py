"""The resume matrix of `docs/reliability.md`: what changes when a run goes on, and what happens.

Every row is carried out: a run of 8 steps is resumed after step 4. `RESUME_MATRIX=write` writes the table anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .rewound import last_checkpoint

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- resume matrix: written by tests/cli/test_resume_matrix.py -->\n", "<!-- end -->\n"
HEAD = "| changed | overrides | what happens |\n|---|---|---|\n"

HASH = re.compile("[0-9a-f]{64}")

STEPS, STOP, BATCH = 8, 4, 2
SMALL = ("image_tokenizer.image_size=32", "logger=none", "threads=1", "plan.strict=false", "~callbacks.progress")
VQVAE = (
    *("task=vqvae", "trainer.max_steps=2", "trainer.val_check_interval=2", "image_tokenizer.quantize_after_steps=1"),
    *("image_tokenizer.quantizer.kmeans_iters=1", "data.train_size=8", "data.val_size=4", "data.batch_size=4", *SMALL),
)
PRETRAIN = (
    *("task=pretrain", "sequences.source=images", "image_tokenizer.path=first", "text.vocab_size=320", *SMALL),
    *(f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "callbacks.checkpoint.save_top_k=-1"),
    *(
        "callbacks.checkpoint.every_n_train_steps=2",
        "data.train_size=48",
        "data.val_size=4",
        f"data.batch_size={BATCH}",
    ),
    *("model.num_layers=1", "model.dropout=0.1", "seed=3", "~callbacks.samples", "~callbacks.activations"),
)
LR, END_OF_COSINE = 4e-4, 0.02


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        changed: first column.
        overrides: second column; what is given besides `resume=RUN`.
        happens: third column; None: the run is refused, and the message is the third column.
        holds: whether a run that has gone on is as the third column says: its folder, and the uninterrupted run.
        finished: resume the finished run, not the stopped one.
    """

    changed: str
    overrides: tuple[str, ...]
    happens: str | None = None
    holds: Callable[[Path, Path], bool] = lambda run, whole: False
    finished: bool = False


def contents(run: Path) -> dict[Path, bytes]:
    return {file.relative_to(run): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def weights(run: Path) -> bytes:
    return (run / "model" / "weights.safetensors").read_bytes()


def groups(run: Path) -> list[dict[str, Any]]:
    return last_checkpoint(run)["optimizer_states"][0]["param_groups"]


def consumed(run: Path) -> int:
    """Samples that a run has trained on."""
    return last_checkpoint(run)["DataModule"]["consumed"]


def rate(run: Path) -> float:
    """Learning rate of the step after the last one."""
    return groups(run)[0]["lr"]


def same(run: Path, whole: Path) -> bool:
    return weights(run) == weights(whole)


def has(option: str, *values: Any) -> Callable[[Path, Path], bool]:
    """Whether the groups of the optimizer have these values, and the run differs from the uninterrupted one."""
    return lambda run, whole: [group[option] for group in groups(run)] == [*values] and not same(run, whole)


def with_rate(factor: float, steps: int) -> Callable[[Path, Path], bool]:
    """Whether the run ended at a step with a learning rate."""
    return lambda run, whole: (
        rate(run) == pytest.approx(LR * factor, rel=1e-3) and last_checkpoint(run)["global_step"] == steps
    )


def equals_step_6(run: Path, whole: Path) -> bool:
    at_the_end, then = (last_checkpoint(folder)["state_dict"] for folder in (run, run.parent / "at_6"))
    return all(bool((at_the_end[name] == then[name]).all()) for name in then)


SEED = ("seed=4",)
GROWN, OTHER = ("data.train_size=56",), ("data.seed=1",)
UNCHECKED = ("verify=false",)
ROWS = (
    Row("nothing", (), "bit-equal to the run without interruption", same),
    Row(
        "learning rate",
        ("optimizer.optimizer.lr=1e-4",),
        "takes effect in the next step, at the same place of the schedule",
        lambda run, whole: rate(run) == pytest.approx(1e-4 * END_OF_COSINE) and not same(run, whole),
    ),
    Row(
        "weight decay",
        ("optimizer.weight_decay=0.5",),
        "takes effect in the next step, on matrices and embeddings",
        has("weight_decay", 0.5, 0.5, 0.0),
    ),
    Row(
        "betas, eps",
        ("optimizer.optimizer.betas=[0.8,0.9]", "optimizer.optimizer.eps=1e-6"),
        "take effect in the next step; the moments are kept",
        lambda run, whole: has("eps", *[1e-6] * 3)(run, whole) and list(groups(run)[0]["betas"]) == [0.8, 0.9],
    ),
    Row("optimizer", ("optimizer=muon",)),
    Row(
        "batch size",
        ("data.batch_size=4",),
        "the run goes on with the next sample; steps are larger",
        lambda run, whole: consumed(run) == STOP * BATCH + (STEPS - STOP) * 4,
    ),
    Row(
        "accumulation",
        ("trainer.accumulate_grad_batches=3",),
        "the run goes on with the next sample; each step has three batches, from the first on",
        lambda run, whole: consumed(run) == STOP * BATCH + (STEPS - STOP) * 3 * BATCH,
    ),
    Row(
        "precision",
        ("precision=bf16",),
        "weights and moments stay fp32; the next step computes in bf16",
        lambda run, whole: not same(run, whole) and last_checkpoint(run)["global_step"] == STEPS,
    ),
    Row(
        "more steps, of a finished run",
        ("trainer.max_steps=12",),
        "the learning rate stays at the end of the old schedule (`optimizer.final_lr`)",
        with_rate(END_OF_COSINE, 12),
        finished=True,
    ),
    Row(
        "more steps, longer schedule",
        ("trainer.max_steps=12", "optimizer.schedule_steps=16"),
        "the learning rate follows the longer cosine; it rises to it in one step",
        with_rate(END_OF_COSINE + (1 - END_OF_COSINE) * 0.16543, 12),  # (1 + cos(π 11/15)) / 2, after one step of rise
        finished=True,
    ),
    Row(
        "more steps, warmed up again",
        ("trainer.max_steps=12", "optimizer.schedule_start=8", "optimizer.warmup=0.5"),
        "the learning rate rises again over half of the new steps, and falls until the new end",
        with_rate(END_OF_COSINE, 12),
        finished=True,
    ),
    Row("no more steps, of a finished run", (), "one line says that nothing is left; nothing is written", same, True),
    Row(
        "fewer steps",
        ("trainer.max_steps=6",),
        "the run ends earlier, as it was at that step; its schedule stays",
        equals_step_6,
    ),
    Row("fewer steps than done", ("trainer.max_steps=3",)),
    Row("data grown", GROWN),
    Row("data changed", OTHER),
    Row("seed", SEED),
    Row(
        "seed, unchecked",
        (*SEED, *UNCHECKED),
        "the run goes on at the same number of samples in another order",
        lambda run, whole: consumed(run) == STEPS * BATCH and not same(run, whole),
    ),
    Row("image tokenizer", ("image_tokenizer.path=second",)),
    Row("model", ("model.hidden_size=64",)),
)
DEVICES = Row(
    "devices 1 → 2 → 1",
    ("trainer.devices=2", "strategy=ddp"),
    "the run goes on with the next sample; each device has a batch, so steps are larger, and no sample is used twice",
)


@pytest.fixture(scope="module")
def stopped(cli, tmp_path_factory) -> Path:
    """A folder with the uninterrupted run `whole`, its state at step 4 in `at_4`, and two image tokenizers."""
    home = tmp_path_factory.mktemp("matrix")
    setup = [[*VQVAE, "run_dir=first"], [*VQVAE, "run_dir=second", "seed=1"], [*PRETRAIN, "run_dir=whole"]]
    ended = cli.run_many([(words, home) for words in setup], home)
    assert [result.code for result in ended] == [0, 0, 0], ended
    for step in (STOP, 6):
        shutil.copytree(home / "whole", home / f"at_{step}")
        for made in ("model", "metrics.json"):
            path = home / f"at_{step}" / made
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        checkpoints = home / f"at_{step}" / "checkpoints"
        shutil.copy(checkpoints / f"step_{step}.ckpt", checkpoints / "last.ckpt")
    return home


def test_every_row_of_the_matrix(cli, stopped: Path) -> None:
    runs = [stopped / f"run_{number}" for number in range(len(ROWS))]
    for row, run in zip(ROWS, runs, strict=True):
        shutil.copytree(stopped / ("whole" if row.finished else f"at_{STOP}"), run)
    before = [contents(run) for run in runs]
    cases = [([f"resume={run.name}", *row.overrides], stopped) for row, run in zip(ROWS, runs, strict=True)]
    found = {}
    for row, run, state, ended in zip(ROWS, runs, before, cli.run_many(cases, stopped), strict=True):
        after = contents(run)
        written = sorted(str(path) for path in state.keys() | after.keys() if state.get(path) != after.get(path))
        if row.happens is None:
            assert ended.code == 2 and ended.stderr.count("\n") == 1, (row.changed, ended)
            assert not written, (row.changed, written)
            message = ended.stderr.strip().removeprefix("cogview_pl: ").replace(run.name, "RUN")
            found[row] = f"refused: `{HASH.sub('…', message)}`"
        else:
            assert ended.code == 0, (row.changed, ended.stderr)
            assert row.holds(run, stopped / "whole"), (row.changed, rate(run), consumed(run))
            changes = [word.partition("=")[0] for word in row.overrides if word not in UNCHECKED]
            assert all(f"{key}=" in ended.stdout for key in changes if "." in key), ended.stdout
            assert bool(written) == bool(row.overrides or not row.finished), written
            found[row] = row.happens
    require_documented([(row, found[row]) for row in ROWS] + [(DEVICES, str(DEVICES.happens))])


@pytest.mark.slow
def test_a_run_goes_on_with_more_devices_and_with_fewer_again(cli, stopped: Path) -> None:
    run = stopped / "devices"
    shutil.copytree(stopped / f"at_{STOP}", run)
    on_two = [f"resume={run}", *DEVICES.overrides, "trainer.max_steps=6"]
    (ended,) = cli.run_on_two([(on_two, stopped)], stopped)
    assert ended.code == 0, ended.stderr
    assert consumed(run) == STOP * BATCH + 2 * 2 * BATCH
    on_one = [f"resume={run}", "trainer.devices=1", "strategy=single", "trainer.max_steps=8"]
    (ended,) = cli.run_many([(on_one, stopped)], stopped)
    assert ended.code == 0, ended.stderr
    assert consumed(run) == STOP * BATCH + 2 * 2 * BATCH + 2 * BATCH
    assert rate(run) == pytest.approx(LR * END_OF_COSINE)


def require_documented(rows: list[tuple[Row, str]]) -> None:
    lines = [f"| {row.changed} | {' '.join(f'`{o}`' for o in row.overrides)} | {words} |\n" for row, words in rows]
    table = BEGIN + HEAD + "".join(lines) + END
    text = DOCUMENT.read_text(encoding="utf-8")
    documented = re.search(re.escape(BEGIN) + ".*?" + re.escape(END), text, re.DOTALL)
    assert documented is not None
    if os.environ.get("RESUME_MATRIX") == "write":
        DOCUMENT.write_text(text.replace(documented[0], table), encoding="utf-8")
    else:
        assert documented[0] == table
