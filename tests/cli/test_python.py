"""`cogview_pl.run(...)` from a script or a notebook: the metrics of the command line, errors that can be caught."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

JOB = (
    "task=vqvae",
    "trainer.max_steps=2",
    "data.train_size=16",
    "data.val_size=8",
    "data.batch_size=8",
    "image_tokenizer.quantize_after_steps=1",
    "image_tokenizer.quantizer.kmeans_iters=1",
)

SCRIPT = """
    import asyncio, contextlib, io, json, logging, os, sys, threading
    import torch
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from cogview_pl import run
    from cogview_pl.errors import UserError

    JOB = {job}

    def state():
        return [
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            GlobalHydra.instance().hydra,
            HydraConfig.instance().cfg,
            list(logging.getLogger().handlers),
            list(logging.getLogger("cogview_pl").handlers),
            sorted(os.environ.items()),
            list(sys.argv),
            threading.active_count(),
        ]

    async def in_a_notebook():
        with contextlib.redirect_stdout(io.StringIO()):
            return run(*JOB, "run_dir=second")

    def message(*words):
        try:
            run(*words)
        except UserError as error:
            return str(error)

    torch.set_num_threads(2)
    before = state()
    first = run(*JOB, "run_dir=first", "threads=1")
    leaked = [(one, other) for one, other in zip(before, state()) if one != other]
    assert not leaked, leaked
    second = asyncio.run(in_a_notebook())
    wrong = (["sed=1"], ["seed=-1"], ["run_dir=first"], ["-m", "seed=0,1"])
    refused = [message("task=vqvae", *words) for words in wrong]
    leaked = [(one, other) for one, other in zip(before, state()) if one != other]
    assert not leaked, leaked
    print(json.dumps([first, second, refused]))
"""


@pytest.fixture(scope="module")
def called(cli, tmp_path_factory) -> tuple[Path, list]:
    home = tmp_path_factory.mktemp("python")
    (home / "script.py").write_text(textwrap.dedent(SCRIPT).format(job=JOB))
    ended = cli.run_script(home / "script.py", home)
    assert ended.code == 0, ended.stderr[-3000:]
    return home, json.loads(ended.stdout.splitlines()[-1])


def test_it_returns_the_metrics_of_the_run(called) -> None:
    home, (first, second, _) = called
    assert first == json.loads((home / "first" / "metrics.json").read_text())
    assert second["eval/psnr"] == first["eval/psnr"] > 10


def test_what_the_user_can_mend_is_an_error_with_one_line(called) -> None:
    _, (_, _, refused) = called
    words = [("sed", "seed"), ("seed=-1", "4294967295"), ("run_dir=first", "earlier run"), ("-m", "once per run")]
    for message, expected in zip(refused, words, strict=True):
        assert message is not None and "\n" not in message
        assert all(word in message for word in expected), message
