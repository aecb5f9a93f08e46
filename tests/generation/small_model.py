"""A small sequence model with random weights, whose scale makes logits depend on the prompt."""

from __future__ import annotations

import torch

from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary
from tests.make_models import make_transformer

VOCABULARY = Vocabulary(codebook_size=40, text_vocab_size=12)
TWO_IMAGES = Template(
    "[ROI1] {text} [BASE] [BOI1] {small:2x2} [EOI1] [ROI2] [POS0] [BASE] [BOI2] {large:4x4} [EOI2]",
    target="large",
    loss={},
    vocabulary=VOCABULARY,
    text_length=8,
    restart_positions_at="[ROI2]",
)
"""Super-resolution with positions that start again."""


def small_model(template: Template, *, init_std: float, norm_scope: str = "token") -> Transformer:
    """Two layers of hidden size 32 for the vocabulary and positions of a template; always the same weights."""
    torch.manual_seed(0)
    model = make_transformer(
        vocab_size=template.vocabulary.size,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        num_positions=template.num_positions,
        norm_scope=norm_scope,
        init_std=init_std,
    )
    return model.eval()
