"""Small models of both stages, built from plain values."""

from __future__ import annotations

from typing import Any

from cogview_pl.checkpoints.model_folder import build_transformer, build_vqvae
from cogview_pl.checkpoints.settings import from_plain, plain
from cogview_pl.transformer.config import TransformerConfig
from cogview_pl.transformer.model import Transformer
from cogview_pl.vqvae.config import BUILT_IN, PROJECTED
from cogview_pl.vqvae.model import VQVAE
from cogview_pl.vqvae.quantizer_registry import build_quantizer

TRANSFORMER = {"norm": "sandwich", "norm_scope": "token", "attention": "fused", "dropout": 0.0, "init_std": 0.02}
"""Options of a transformer that tests leave out."""
QUANTIZERS: dict[str, dict[str, Any]] = {
    "ema": {
        "_target_": f"{BUILT_IN}.EMAQuantizer",
        "decay": 0.99,
        "commitment_weight": 0.25,
        "kmeans_iters": 10,
        "dead_threshold": 0.1,
        "revive_every": 20,
    },
    "learned": {"_target_": f"{BUILT_IN}.LearnedQuantizer", "commitment_weight": 0.25},
    "fixed": {"_target_": f"{BUILT_IN}.FixedQuantizer", "commitment_weight": 0.25},
    "gumbel": {
        "_target_": f"{BUILT_IN}.GumbelQuantizer",
        "hard": True,
        "kl_weight": 5e-4,
        "temperature_start": 1.0,
        "temperature_end": 1 / 16,
    },
    "cosine": {
        "_target_": f"{PROJECTED}.CosineQuantizer",
        "projected_dim": 3,
        "decay": 0.99,
        "commitment_weight": 0.25,
        "kmeans_iters": 10,
        "dead_threshold": 0.1,
        "revive_every": 20,
    },
    "fsq": {"_target_": f"{PROJECTED}.FSQQuantizer", "levels": [4, 8]},
}
"""Arguments of quantizers that tests leave out."""
VQVAE_SIZES: dict[str, Any] = {
    "downsampling": 8,
    "residual_blocks": 0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
"""Options of a VQ-VAE that tests leave out."""


def transformer_settings(**options: Any) -> dict[str, Any]:
    """All settings of a transformer, as model folders hold them; options may be Enum members."""
    return {**TRANSFORMER, **plain(options)}


def quantizer_options(kind: str = "ema", **options: Any) -> dict[str, Any]:
    """`image_tokenizer.quantizer` for a built-in class, by its name in the group of the configuration."""
    return {**QUANTIZERS[kind], **options}


def make_quantizer(kind: str, *, codebook_size: int, codebook_dim: int, **options: Any) -> Any:
    """A built-in quantizer."""
    return build_quantizer(quantizer_options(kind, **options), codebook_size=codebook_size, codebook_dim=codebook_dim)


def vqvae_settings(kind: str = "ema", **options: Any) -> dict[str, Any]:
    """All settings of a VQ-VAE, as model folders hold them; `quantizer` may give arguments of the quantizer."""
    quantizer = quantizer_options(kind, **options.pop("quantizer", {}))
    return {**VQVAE_SIZES, **options, "quantizer": quantizer}


def make_vqvae(kind: str = "ema", **options: Any) -> VQVAE:
    """A VQ-VAE: `hidden_size`, `codebook_dim`, `codebook_size`, and any other field of `VQVAEConfig`."""
    return build_vqvae(vqvae_settings(kind, **options))


def make_config(**options: Any) -> TransformerConfig:
    """Options of a transformer."""
    return from_plain(TransformerConfig, transformer_settings(**options))


def make_transformer(**options: Any) -> Transformer:
    """A transformer: `vocab_size`, the four sizes, and any other field of `TransformerConfig`."""
    return build_transformer(transformer_settings(**options))
