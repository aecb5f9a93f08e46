"""Whether a codebook has collapsed: most of its codes are unused, so the codes say little about an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogview_pl.vqvae.config import ImageTokenizerConfig

_NODE = "image_tokenizer.quantizer"
_FEW_STEPS = 200  # k-means, moving averages and revivals of codes need about as many steps with quantization
_SLOWER = 10  # factor of the learning rate to try


def collapse(
    metrics: Mapping[str, float],
    options: ImageTokenizerConfig,
    *,
    codes_counted: int,
    steps: int,
    optimizer: Mapping[str, Any],
) -> str | None:
    """A sentence about a collapsed codebook, with the likely cause and the override to try; None without collapse.

    Args:
        metrics: `codebook/usage` and `codebook/perplexity` of the last validation.
        options: options of the image tokenizer.
        codes_counted: number of codes of the validation images, which limits both metrics.
        steps: training steps with quantization.
        optimizer: `_target_` node of the optimizer.
    """
    usage, perplexity = metrics.get("codebook/usage"), metrics.get("codebook/perplexity")
    if usage is None or perplexity is None or not codes_counted:
        return None
    size = options.codebook_size
    reachable = min(size, codes_counted)
    used = usage * size / reachable
    if used >= options.min_codebook_share and perplexity / reachable >= options.min_codebook_share:
        return None
    return (
        f"the codebook has collapsed: validation images use {usage:.1%} of its {size} codes, with perplexity "
        f"{perplexity:.1f} (image_tokenizer.min_codebook_share={options.min_codebook_share:g}). Likely cause: "
        f"{_cause(options, steps, optimizer, few_used=used < options.min_codebook_share)}"
    )


def _cause(options: ImageTokenizerConfig, steps: int, optimizer: Mapping[str, Any], *, few_used: bool) -> str:
    quantizer = {
        key: getattr(options.quantizer, key, None) for key in ("revive_every", "dead_threshold", "kmeans_iters")
    }
    if steps < _FEW_STEPS:
        return f"only {steps} steps trained it; raise trainer.max_steps"
    if None in quantizer.values():
        return "codes that nothing chooses stay unused; try image_tokenizer/quantizer=ema, which revives them"
    if not quantizer["revive_every"]:
        return f"unused codes are not revived; try {_NODE}.revive_every=20"
    if not quantizer["dead_threshold"]:
        return f"unused codes are not found; try {_NODE}.dead_threshold=0.05"
    if not quantizer["kmeans_iters"]:
        return f"the codebook started at random; try {_NODE}.kmeans_iters=5"
    if not few_used:
        return f"the images need fewer codes; try image_tokenizer.codebook_size={options.codebook_size // 2}"
    if "lr" in optimizer:
        return f"too high a learning rate; try optimizer.optimizer.lr={float(optimizer['lr']) / _SLOWER:g}"
    return "too high a learning rate; lower it"
