"""Images to codes and codes to images, in batches, by an image tokenizer.

Shapes: B images, Y X pixels, y x grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vqvae.external import AnyTokenizer


def encode_images(images: Sequence[Tensor], model: AnyTokenizer, batch_size: int) -> Tensor:
    """Codes int64 `(B, y, x)`, on the CPU, of uint8 images `(3, Y, X)` of one size."""
    device, parts = _device(model), []
    for part in torch.stack(list(images)).split(batch_size):
        SIGNALS.check()
        parts.append(model.encode(part.to(device).float() / 255).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def decode_codes(codes: Tensor, model: AnyTokenizer, batch_size: int) -> Tensor:
    """Images `(B, 3, Y, X)`, float 0 … 1, on the CPU, of codes `(B, y, x)`."""
    device, parts = _device(model), []
    for part in codes.split(batch_size):
        SIGNALS.check()
        parts.append(model.decode(part.to(device)).clamp(0, 1).cpu())
    return torch.cat(parts)


def _device(model: AnyTokenizer) -> torch.device:
    return next(model.parameters()).device
