"""Stages of a chain that run at the same time give what they give one after the other, also after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

RECIPE = """
defaults:
  - override /task: chain
task: lanes
side_by_side: {lanes}
common: [data.batch_size=4, data.val_size=4, data.train_size=16, image_tokenizer.quantize_after_steps=1, seed=7]
stages:
  one: [task=vqvae, trainer.max_steps=4, trainer.val_check_interval=4]
  two: [task=features, features.epochs=1, data.batch_size=4]
  three: [task=vqvae, trainer.max_steps=2, optimizer=muon]
"""
GIVEN = ("logger=none", "plan.strict=false", "threads=2")
STOP = ("+callbacks.signal._target_=tests.cli.signalling.SignalAt", "+callbacks.signal.step=3")
pytestmark = pytest.mark.slow  # a process for each stage


def _recipe(home: Path, lanes: str) -> None:
    (home / "experiments" / "lanes").mkdir(parents=True)
    (home / "experiments" / "lanes" / "config.yaml").write_text(RECIPE.format(lanes=lanes))


def _chain(home: Path) -> tuple[Path, dict]:
    (folder,) = (path for path in (home / "outputs" / "lanes").iterdir() if path.name != "latest")
    return folder, json.loads((folder / "chain.json").read_text())["stages"]


def _weights(home: Path, stages: dict, name: str) -> bytes:
    return (home / stages[name]["folder"] / "model" / "weights.safetensors").read_bytes()


def test_lanes_give_the_runs_of_a_chain_in_order(cli, tmp_path: Path) -> None:
    in_order, lanes = tmp_path / "in_order", tmp_path / "lanes"
    _recipe(in_order, "[]")
    _recipe(lanes, "[[one], [two, three], [taken_out]]")
    cli.succeed(["experiment=lanes", *GIVEN[:-1], "threads=1"], in_order)
    ended = cli.run(["experiment=lanes", *GIVEN, *STOP], lanes)
    assert ended.code == 2 and "stage one ended with code 143" in ended.stderr, ended.stderr
    folder, stages = _chain(lanes)
    assert stages["one"]["metrics"] is None and (folder / "one.log").read_text()
    cli.succeed([f"resume=outputs/lanes/{folder.name}"], lanes)
    _, expected = _chain(in_order)
    _, found = _chain(lanes)
    assert set(found) == set(expected) == {"one", "two", "three"}
    assert list(OmegaConf.load(folder / "config.resumed-2.yaml").stages) == ["one", "two", "three"]
    assert found["one"]["folder"] == stages["one"]["folder"]  # it went on
    for name in ("one", "three"):
        assert _weights(lanes, found, name) == _weights(in_order, expected, name)
    same = {"eval/psnr", "val/loss_reconstruction"}
    assert all(found["one"]["metrics"][key] == expected["one"]["metrics"][key] for key in same)
    assert (lanes / "outputs" / "vqvae" / "latest").resolve() == (lanes / found["three"]["folder"]).resolve()
    assert (folder / "report.html").exists()
