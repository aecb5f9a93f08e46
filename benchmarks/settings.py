"""Sizes and precisions of the benchmarks, and models of these sizes with random weights."""

from __future__ import annotations

import torch

from cogview_pl.transformer.config import AttentionForm, Norm, NormScope, TransformerConfig
from cogview_pl.transformer.model import Transformer
from cogview_pl.vocab import Template, Vocabulary

SHAPES = {  # layers, hidden size, heads
    "S1": (6, 384, 6),
    "S2": (12, 768, 12),
    "cogview_400m": (24, 1088, 17),
    "cogview_4b": (48, 2560, 40),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGE_CODES, TEXT_TOKENS = 8192, 50_000
PROMPT, TOP_K = 64, 200
TEXT = list(range(PROMPT - 3))
"""Text token ids of a text that makes a text-to-image prompt of 64 tokens."""


def text_to_image(shape: str, grid: int, *, norm_scope: str = "token") -> tuple[Transformer, Template]:
    """A generator of `grid` x `grid` codes and its layout; fp32, on `DEVICE`."""
    layout = f"[ROI1] {{text}} [BASE] [BOI1] {{image:{grid}x{grid}}} [EOI1]"
    return _model(shape, _template(layout, "image"), norm_scope)


def super_resolution(shape: str, grid: int, *, norm_scope: str = "token") -> tuple[Transformer, Template]:
    """A model that doubles images of `grid` x `grid` codes in windows, and its layout; fp32, on `DEVICE`."""
    half = grid // 2
    layout = (
        f"[ROI1] {{text}} [BASE] [BOI1] {{small:{half}x{half}}} [EOI1] "
        f"[ROI2] [POS0] [BASE] [BOI2] {{large:{grid}x{grid}}} [EOI2]"
    )
    return _model(shape, _template(layout, "large", restart_positions_at="[ROI2]"), norm_scope)


def captioner(shape: str, grid: int) -> tuple[Transformer, Template]:
    """A model that writes text about images of `grid` x `grid` codes, and its layout; fp32, on `DEVICE`."""
    layout = f"[BASE] [BOI1] {{image:{grid}x{grid}}} [EOI1] [ROI1] {{text}} [SEP]"
    return _model(shape, _template(layout, "text"), "token")


def vocab_size() -> int:
    """Size of the released vocabulary: 58,240."""
    return Vocabulary(IMAGE_CODES, TEXT_TOKENS).size


def _template(layout: str, target: str, restart_positions_at: str | None = None) -> Template:
    return Template(
        layout,
        target=target,
        loss={target: 1.0},
        vocabulary=Vocabulary(IMAGE_CODES, TEXT_TOKENS),
        text_length=len(TEXT),
        restart_positions_at=restart_positions_at,
    )


def _model(shape: str, template: Template, norm_scope: str) -> tuple[Transformer, Template]:
    layers, hidden_size, heads = SHAPES[shape]
    with DEVICE:  # a CPU takes a minute for billions of random numbers
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=hidden_size,
            num_heads=heads,
            num_positions=template.num_positions,
            norm=Norm.sandwich,
            norm_scope=NormScope(norm_scope),
            attention=AttentionForm.fused,
            dropout=0.0,
            init_std=0.02,
        )
        model = Transformer(config, vocab_size=template.vocabulary.size)
    return model.eval(), template
