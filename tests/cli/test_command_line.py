"""Arguments that Hydra, a stage of a chain, and another process of a run get."""

from __future__ import annotations

import sys

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from cogview_pl.cli.command_line import (
    config_flags,
    hydra_words,
    job_name,
    job_words,
    words_for_stages,
)


@pytest.fixture
def hydra_config(monkeypatch: pytest.MonkeyPatch):
    """Sets Hydra's state of a run: its mode, the number of the job, and the overrides."""

    def set_config(mode: RunMode, overrides: list[str]) -> None:
        hydra = {"mode": mode, "job": {"name": "seed=1"}, "overrides": {"task": overrides}}
        monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": hydra}))

    return set_config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["task=vqvae", "prompts=[红色]"], ["task=vqvae", "prompts=['红色']"]),
        (["+experiment=quickstart", "+trainer.benchmark=true"], ["experiment=quickstart", "+trainer.benchmark=true"]),
        (["task=vqvae", "--multirun", "seed=0,1"], ["--multirun", "task=vqvae", "seed=0,1"]),  # flags in any place
        ([], []),
    ],
)
def test_words_for_hydra(words: list[str], expected: list[str]) -> None:
    assert hydra_words(words) == expected


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["task=vqvae"], []),
        (["--config-dir", "mine", "task=vqvae"], ["--config-dir", "mine"]),
        (["task=vqvae", "--config-dir=mine"], ["--config-dir=mine"]),
        (["-cd", "mine", "-m", "-cn", "other"], ["-cd", "mine", "-cn", "other"]),
    ],
)
def test_folders_of_configurations(words: list[str], flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cogview_pl", *words])
    assert config_flags() == flags


def test_words_of_a_run_and_of_a_job_of_a_sweep(monkeypatch: pytest.MonkeyPatch, hydra_config) -> None:
    monkeypatch.setattr(sys, "argv", ["cogview_pl", "--config-dir", "mine", "-m", "seed=0,1"])
    hydra_config(RunMode.RUN, ["seed=1"])
    assert (job_name(), job_words()) == (None, ["--config-dir", "mine", "-m", "seed=0,1"])
    hydra_config(RunMode.MULTIRUN, ["seed=1"])
    assert (job_name(), job_words()) == ("seed=1", ["--config-dir", "mine", "seed=1"])


def test_the_stages_of_a_chain_get_what_was_given_for_all_of_them(hydra_config) -> None:
    given = ["experiment=quickstart", "seed=3", "+trainer.benchmark=true", "~callbacks.progress", "task=chain"]
    hydra_config(RunMode.RUN, [*given, "stages.first=[]", "common=[]", "run_dir=here", "outputs=there", "resume=true"])
    words = ["seed=3", "+trainer.benchmark=true", "~callbacks.progress", "outputs=there"]
    assert words_for_stages({}) == words
    assert words_for_stages({"seed": "3"}) == words[1:]
