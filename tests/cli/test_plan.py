"""plan=true: what it counts."""

from __future__ import annotations

from cogview_pl.tasks.plan import run as plan

from ..composed import composed


def painting(*overrides: str) -> dict[str, float]:
    return plan(composed("task=generate", "plan=true", *overrides))


def cache_bytes(*overrides: str) -> float:
    return painting(*overrides)["memory/kv_cache_bytes"]


def test_guidance_doubles_the_cache_of_the_painter_only() -> None:
    plain, guided = cache_bytes(), cache_bytes("sampler.guidance=3")
    assert guided == 2 * plain
    enlarging = cache_bytes("upscale_with=sr")
    assert plain < enlarging < guided  # one model at a time fills its cache, so the larger counts
    assert cache_bytes("upscale_with=sr", "sampler.guidance=3") == guided


def test_quantized_weights_are_counted() -> None:
    options = ("precision=bf16", "model=cogview_4b")
    plain, int8, int4 = (painting(f"weights={weights}", *options) for weights in ("null", "int8", "int4"))
    key, width, layers = "memory/sequence_models_bytes", 2560, 48
    assert plain[key] == 2 * plain["sequence_model/parameters"]
    assert plain[key] - int8[key] == 12 * layers * width**2
    assert int4[key] < int8[key]
    assert int4["memory/kv_cache_bytes"] == plain["memory/kv_cache_bytes"]


def test_activations_under_each_choice_of_checkpointing() -> None:
    config = composed("task=pretrain", "plan=true", "model.dropout=0.1", "data.batch_size=4")
    figures = plan(config)
    none, selective, block = (figures[f"memory/activations_{name}_bytes"] for name in ("none", "selective", "block"))
    assert none > selective > block
    stream = 4 * (figures["sequence_model/longest_sequence"] - 1) * config.model.width * 4
    assert block - none / config.model.num_layers < (config.model.num_layers + 5) * stream  # inputs of blocks, and ends
