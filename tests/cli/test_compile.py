"""compile=true works in all trainings, and is refused in one line without a compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cogview_pl.assembly.checks import prepare_compiler
from cogview_pl.config.parts import training_options
from cogview_pl.errors import UserError

from ..composed import composed


def test_a_missing_compiler_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match=r"compile=true.*/nowhere/g\+\+ was not found.*compile=false"):
        prepare_compiler(training_options(composed("task=pretrain", "compile=true", "trainer.accelerator=cpu")))
    prepare_compiler(
        training_options(composed("task=pretrain", "compile=false", "trainer.accelerator=cpu"))
    )  # without compile=true the compiler is not searched


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(cli, chain, tmp_path: Path, tiny) -> None:
    """Losses differ by rounding only, and saved files do not depend on compiling."""
    few = ("trainer.max_steps=2", "trainer.val_check_interval=2", f"data.token_store={chain.run_folder('tokenize')}")
    found = []
    for name, extra in {
        "plain": (),
        "compiled": ("compile=true", "activation_checkpointing=selective"),
    }.items():
        run = tmp_path / name
        cli.succeed(["task=pretrain", *tiny, *few, *extra, f"run_dir={run}"], tmp_path)
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        saved = load_file(run / "model" / "weights.safetensors").keys()
        found.append(
            (metrics["val/loss_text"], metrics["val/loss_image"], saved, (run / "model/config.yaml").read_text())
        )
    (*plain, names, settings), (*compiled, compiled_names, compiled_settings) = found
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert compiled_names == names and compiled_settings == settings
