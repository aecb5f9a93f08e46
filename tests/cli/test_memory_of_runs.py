"""Jobs of a sweep, stages of a chain and calls from Python leave no models of theirs in memory."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

JOB = [
    *("data.batch_size=4", "data.val_size=4", "data.train_size=8", "trainer.max_steps=1", "logger=none", "threads=1"),
    *("image_tokenizer.quantize_after_steps=0", "image_tokenizer.quantizer.kmeans_iters=0", "plan.strict=false"),
    "+callbacks.counts._target_=mine.Counts",
]

CALLBACK = """
    import gc, json
    from lightning import Callback
    from torch import Tensor

    class Counts(Callback):
        '''Notes the bytes of live tensors when a training begins; Python itself collects nothing.'''

        def on_train_start(self, trainer, module):
            gc.disable()
            found = sum(thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), Tensor))
            with open("counts.jsonl", "a") as file:
                print(json.dumps(found), file=file)
"""

RECIPE = """
defaults:
  - override /task: chain
task: mini
stages: {first: [task=vqvae], second: [task=vqvae]}
"""

SCRIPT = """
    from cogview_pl import run
    for seed in range(2):
        run("task=vqvae", f"seed={{seed}}", *{words})
"""


def counts(folder: Path) -> list[int]:
    """Of each run in a working folder, and cleared for the next test."""
    file = folder / "counts.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return found


@pytest.mark.slow
def test_each_run_begins_with_as_many_tensors_as_the_first(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(textwrap.dedent(CALLBACK))
    (tmp_path / "experiments" / "mini").mkdir(parents=True)
    (tmp_path / "experiments" / "mini" / "config.yaml").write_text(RECIPE)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT).format(words=JOB))
    ends = {
        "sweep": lambda: cli.run(["-m", "task=vqvae", "seed=0,1", *JOB], tmp_path),
        "chain": lambda: cli.run(["experiment=mini", *JOB], tmp_path),
        "python": lambda: cli.run_script(tmp_path / "script.py", tmp_path),
    }
    for name, end in ends.items():
        ended = end()
        assert ended.code == 0, ended.stderr[-3000:]
        first, second = counts(tmp_path)
        assert 0 < second <= 1.01 * first, (name, first, second)
