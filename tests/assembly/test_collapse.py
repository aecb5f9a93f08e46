"""Which codebooks have collapsed, and what the run advises."""

from __future__ import annotations

import pytest

from cogview_pl.assembly.collapse import collapse

from ..composed import composed

OPTIONS = composed("task=vqvae").image_tokenizer
"""512 codes, EMA quantizer, smallest share 0.05."""


def said(usage: float, perplexity: float, options=OPTIONS, counted: int = 10_000, steps: int = 1000, lr: float = 4e-4):
    metrics = {"codebook/usage": usage, "codebook/perplexity": perplexity}
    return collapse(metrics, options, codes_counted=counted, steps=steps, optimizer={"lr": lr})


def test_a_codebook_in_use() -> None:
    assert said(0.99, 118) is None  # the toy world after 500 steps
    assert said(0.05, 0.05 * 512) is None


def test_few_validation_images_cannot_use_all_codes() -> None:
    assert said(60 / 512, 40, counted=64) is None
    assert said(2 / 512, 2, counted=64) is not None


def test_nothing_is_said_without_a_validation() -> None:
    assert collapse({}, OPTIONS, codes_counted=0, steps=10, optimizer={}) is None


@pytest.mark.parametrize(
    ("override", "usage", "steps", "advice"),
    [
        ("seed=0", 0.01, 1000, "Likely cause: too high a learning rate; try optimizer.optimizer.lr=4e-05"),
        ("seed=0", 0.9, 1000, "Likely cause: the images need fewer codes; try image_tokenizer.codebook_size=256"),
        ("seed=0", 0.01, 100, "Likely cause: only 100 steps trained it; raise trainer.max_steps"),
        ("image_tokenizer.quantizer.revive_every=0", 0.01, 1000, "try image_tokenizer.quantizer.revive_every=20"),
        ("image_tokenizer.quantizer.dead_threshold=0", 0.01, 1000, "try image_tokenizer.quantizer.dead_threshold=0.05"),
        ("image_tokenizer.quantizer.kmeans_iters=0", 0.01, 1000, "try image_tokenizer.quantizer.kmeans_iters=5"),
        ("image_tokenizer/quantizer=fixed", 0.01, 1000, "try image_tokenizer/quantizer=ema, which revives them"),
    ],
)
def test_cause_and_override(override: str, usage: float, steps: int, advice: str) -> None:
    found = said(usage, 4.0, composed("task=vqvae", override).image_tokenizer, steps=steps)
    assert found is not None and found.endswith(advice)
    assert found.startswith(f"the codebook has collapsed: validation images use {usage:.1%} of its 512 codes")
