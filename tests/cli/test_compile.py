"""compile=true: one key for all trainings, refused in one line where no compiler is there."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from cogview_pl.config import Config, register_schemas
from cogview_pl.errors import UserError
from cogview_pl.tasks.compiler import prepare_compiler


def compose(*overrides: str) -> Config:
    register_schemas()
    with hydra.initialize(version_base="1.3", config_path="../../conf"):
        config = OmegaConf.to_object(hydra.compose("config", overrides=["task=pretrain", *overrides]))
    assert isinstance(config, Config)
    return config


def test_a_missing_compiler_is_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match=r"compile=true.*/nowhere/g\+\+ was not found.*compile=false"):
        prepare_compiler(compose("compile=true", "trainer.accelerator=cpu"))
    prepare_compiler(compose("compile=false", "trainer.accelerator=cpu"))  # not looked for where nobody asks


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(cli, chain, tmp_path: Path, tiny) -> None:
    """Same steps, same files; the numbers differ by rounding."""
    # A step or two: the codebook of stage 1 and AdamW both enlarge what differs by rounding.
    few = ("trainer.max_steps=2", "trainer.val_check_interval=2", "image_tokenizer.continuous_steps=2")
    tasks = {
        "vqvae": ("val/loss_reconstruction",),
        "pretrain": ("val/loss_text", "val/loss_image"),
    }
    for task, keys in tasks.items():
        found = {}
        for name, extra in {
            "plain": (),
            "compiled": ("compile=true", "activation_checkpointing=selective"),
        }.items():
            store = (f"data.store={chain.run_folder('tokenize')}",) if task == "pretrain" else ()
            run = tmp_path / task / name
            cli.succeed([f"task={task}", *tiny, *few, *store, *extra, f"run_dir={run}"], tmp_path)
            metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
            found[name] = [metrics[key] for key in keys]
            assert "checkpointing" not in (run / "model" / "config.yaml").read_text(encoding="utf-8")
        assert found["compiled"] == pytest.approx(found["plain"], rel=1e-3)
