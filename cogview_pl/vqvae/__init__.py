"""Stage 1: the image tokenizer. Pictures `(B, 3, Y, X)` to codes `(B, y, x)` and back."""

from cogview_pl.vqvae.losses import psnr, reconstruction_loss
from cogview_pl.vqvae.model import VQVAE, VQVAEOutput
from cogview_pl.vqvae.quantizer import (
    EMAQuantizer,
    FixedQuantizer,
    GumbelQuantizer,
    LearnedQuantizer,
    Quantizer,
    QuantizerOutput,
    make_quantizer,
)

__all__ = [
    "VQVAE",
    "EMAQuantizer",
    "FixedQuantizer",
    "GumbelQuantizer",
    "LearnedQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "VQVAEOutput",
    "make_quantizer",
    "psnr",
    "reconstruction_loss",
]
