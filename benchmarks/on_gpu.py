"""Measurements on a GPU of memory and stability, in one command: `nox -s gpu`.

    python -m benchmarks.on_gpu [--tiny] [--only TEXT] [--json FILE]

- memory: planned against measured peaks of tasks, each in a process of its own: training and generation with small,
  400M and 4B models of random weights; 4B with LoRA, and 4B with an 8-bit optimizer, because one card of 80 GB can
  finetune in these two ways.
- stability: fp16 under planted outliers, Sandwich-LN with PB-Relax against plain pre-LN.

`--tiny` runs the same code with sizes for a CPU, and leaves out cases that need a GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import report, stability
from benchmarks.peaks import measure_apart
from benchmarks.random_runs import make_model, make_tokens
from benchmarks.report import Result, Row
from benchmarks.settings import DEVICE, SHAPES

_REFUSED = 2
_PROMPTS = "prompts=[红色的圆形,蓝色的方块,绿色的心形,黑色的星形]"
_FIT = (
    "task=pretrain",
    "~callbacks.samples",  # only training is measured
    "~callbacks.progress",
    "trainer.val_check_interval=1000",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=5",
    "callbacks.checkpoint.every_n_train_steps=null",
    "callbacks.checkpoint.save_last=false",  # a checkpoint of a large model takes minutes and fills the disk
    "callbacks.checkpoint.save_top_k=0",
    "callbacks.checkpoint.save_on_exception=false",
)


@dataclass(frozen=True)
class Case:
    """A task whose memory is planned and measured."""

    title: str
    model: str
    overrides: tuple[str, ...]
    from_weights: bool = False
    """Whether it starts from a model on disk."""


@dataclass(frozen=True)
class Sizes:
    """Cases and sizes of all measurements."""

    cases: tuple[Case, ...]
    steps: int
    """Of every fit."""
    shape: str
    """For stability."""
    stability: tuple[int, int, int]
    """Steps, sequences and tokens of it."""
    common: tuple[str, ...] = ()


_BLOCK = "activation_checkpointing=block"

ON_A_CARD = Sizes(
    cases=(
        Case("fit-small-fp32", "small", (*_FIT, "data.batch_size=64")),
        Case("fit-small-bf16-block", "small", (*_FIT, "precision=bf16", "data.batch_size=64", _BLOCK)),
        Case("fit-400m-bf16", "cogview_400m", (*_FIT, "precision=bf16", "data.batch_size=8")),
        Case("fit-400m-bf16-selective", "cogview_400m", (*_FIT, "precision=bf16", "data.batch_size=8",
             "activation_checkpointing=selective")),
        Case("fit-400m-fp16-block", "cogview_400m", (*_FIT, "precision=fp16", "data.batch_size=8", _BLOCK)),
        Case("fit-4b-lora", "cogview_4b", (*_FIT, "precision=bf16", "lora.rank=16", "data.batch_size=4", _BLOCK),
             from_weights=True),
        Case("fit-4b-8bit", "cogview_4b", (*_FIT, "precision=bf16_true", "optimizer=adamw_8bit", "data.batch_size=4",
             _BLOCK), from_weights=True),
        *(Case(
            f"generate-{name}-bf16",
            model,
            ("task=generate", _PROMPTS, "num_images_per_prompt=4", "precision=bf16"),
            True,
        )
          for name, model in (("small", "small"), ("400m", "cogview_400m"), ("4b", "cogview_4b"))),
        Case("generate-4b-int8", "cogview_4b",
             ("task=generate", _PROMPTS, "num_images_per_prompt=1", "precision=bf16", "quantization=int8"), True),
    ),
    steps=20,
    shape="cogview_400m",
    stability=(200, 8, 1088),
)  # fmt: skip

_FEW = ("data.batch_size=4", "text.vocab_size=400", "text.max_length=8", "threads=1")

TINY = Sizes(
    cases=(
        Case("fit-tiny-fp32", "tiny", (*_FIT, *_FEW)),
        Case("fit-tiny-block", "tiny", (*_FIT, *_FEW, _BLOCK), True),
        Case("fit-tiny-lora", "tiny", (*_FIT, *_FEW, "precision=bf16", "lora.rank=4", _BLOCK), True),
        Case("fit-tiny-8bit", "tiny", (*_FIT, *_FEW, "precision=bf16_true", "optimizer=adamw_8bit", _BLOCK), True),
        Case("generate-tiny", "tiny", ("task=generate", *_FEW, "prompts=[圆,方]"), True),
    ),
    steps=2,
    shape="tiny",
    stability=(12, 2, 12),
)


def rows(sizes: Sizes, folder: Path) -> list[Row]:
    """Memory of every case, then stability; models and token stores are made in `folder`."""
    memory = [Row(f"gpu:{case.title}", partial(_measure, case, sizes.steps, folder)) for case in sizes.cases]
    return [*memory, *stability.rows(sizes.shape, *sizes.stability)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure everything; returns the exit code, 0 if all results are as expected."""
    parser = argparse.ArgumentParser(prog="on_gpu", description="What only a GPU can show: memory and fp16.")
    parser.add_argument("--tiny", action="store_true", help="the same code on a CPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows with this text in their title")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line of JSON per row")
    options = parser.parse_args(arguments)
    if DEVICE.type != "cuda" and not options.tiny:
        print("gpu: no CUDA device that torch can use; --tiny runs the same code on a CPU", file=sys.stderr)
        return _REFUSED
    if options.tiny:
        SHAPES.setdefault("tiny", (2, 32, 2))
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(TINY if options.tiny else ON_A_CARD, Path(scratch)):
            if options.only not in row.title:
                continue
            try:
                found = row.measure()
            except Exception as error:  # other rows are still useful
                print(f"{row.title}\n    failed: {error}", flush=True)
                failed.append(row.title)
                continue
            print(report.text(row.title, found), flush=True)
            if options.json is not None:
                report.append_json(options.json, row.title, found)
    if failed:
        print(f"gpu: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _measure(case: Case, steps: int, folder: Path) -> Result:
    """Planned and measured peak in bytes, and the time of a step or a run."""
    home = folder / case.model
    sizes = [word for word in case.overrides if word.startswith(("text.", "model."))]
    wanted = ["task=pretrain", f"model={case.model}", *sizes]
    if not (home / "outputs" / "tokenize").exists():
        make_tokens(home / "outputs", wanted)
    if case.from_weights and not (home / "outputs" / "pretrain").exists():
        make_model(home / "outputs", wanted)
    fit = case.overrides[0] == "task=pretrain"
    more = (f"trainer.max_steps={steps}",) if fit else ()
    if fit and case.from_weights:
        more += ("init_from=outputs/pretrain/latest",)
    peak = measure_apart([*case.overrides, f"model={case.model}", *more], home)
    values = {"measured": peak.measured / 1e9, "planned": peak.planned / 1e9}
    facts: dict[str, float | int | str] = {"planned / measured": 1 + peak.error, "peak in the": peak.phase}
    if peak.steps_per_s:
        facts["s per step"] = 1 / peak.steps_per_s
    return Result("GB", values, {}, facts)


if __name__ == "__main__":
    sys.exit(main())
