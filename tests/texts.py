"""Text tokenizers that tests train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cogview_pl.vocab import TextTokenizer
from cogview_pl.vocab.config import TextConfig


def learned_text(
    captions: Iterable[str], vocab_size: int, seed_sentences: int = 1_000_000, **options: Any
) -> TextTokenizer:
    """A tokenizer of captions, with BPE and full coverage of characters unless `options` say otherwise."""
    config = TextConfig(**{"vocab_size": vocab_size, "model_type": "bpe", "character_coverage": 1.0, **options})
    return TextTokenizer.train(captions, config, seed_sentences)
