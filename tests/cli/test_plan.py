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
