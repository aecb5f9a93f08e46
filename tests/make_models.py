"""Small models of both stages, built from plain values."""

from __future__ import annotations

from typing import Any

from cogview_pl.checkpoints.model_folder import build_transformer
from cogview_pl.checkpoints.settings import from_plain, plain
from cogview_pl.transformer.config import TransformerConfig
from cogview_pl.transformer.model import Transformer

TRANSFORMER = {"norm": "sandwich", "norm_scope": "token", "attention": "fused", "dropout": 0.0, "init_std": 0.02}
"""Options of a transformer that tests leave out."""


def transformer_settings(**options: Any) -> dict[str, Any]:
    """All settings of a transformer, as model folders hold them; options may be Enum members."""
    return {**TRANSFORMER, **plain(options)}


def make_config(**options: Any) -> TransformerConfig:
    """Options of a transformer."""
    return from_plain(TransformerConfig, transformer_settings(**options))


def make_transformer(**options: Any) -> Transformer:
    """A transformer: `vocab_size`, the four sizes, and any other field of `TransformerConfig`."""
    return build_transformer(transformer_settings(**options))
