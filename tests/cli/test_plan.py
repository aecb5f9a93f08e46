"""plan=true: what it counts."""

from __future__ import annotations

import hydra
from omegaconf import OmegaConf

from cogview_pl.config import Config, register_schemas
from cogview_pl.tasks.plan import run as plan


def cache_bytes(*overrides: str) -> float:
    register_schemas()
    with hydra.initialize(version_base="1.3", config_path="../../conf"):
        config = OmegaConf.to_object(hydra.compose("config", overrides=["task=generate", "plan=true", *overrides]))
    assert isinstance(config, Config)
    return plan(config)["memory/kv_cache_bytes"]


def test_guidance_doubles_the_cache_of_the_painter_only() -> None:
    painting, guided = cache_bytes(), cache_bytes("sampler.guidance=3")
    assert guided == 2 * painting
    enlarging = cache_bytes("upscale_with=sr")
    assert painting < enlarging < guided  # one model at a time fills its cache, so the larger counts
    assert cache_bytes("upscale_with=sr", "sampler.guidance=3") == guided


def test_activations_under_each_choice_of_checkpointing() -> None:
    register_schemas()
    overrides = ["task=pretrain", "plan=true", "model.dropout=0.1", "data.batch_size=4"]
    with hydra.initialize(version_base="1.3", config_path="../../conf"):
        config = OmegaConf.to_object(hydra.compose("config", overrides=overrides))
    assert isinstance(config, Config)
    figures = plan(config)
    none, selective, block = (figures[f"memory/activations_{name}_bytes"] for name in ("none", "selective", "block"))
    assert none > selective > block
    stream = 4 * (figures["sequence_model/longest_sequence"] - 1) * config.model.width * 4
    assert block - none / config.model.num_layers < (config.model.num_layers + 5) * stream  # inputs of blocks, and ends
