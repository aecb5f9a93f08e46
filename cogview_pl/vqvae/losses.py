"""Reconstruction losses of the image tokenizer and PSNR. Images are `(B, 3, Y, X)`, 0 black .. 1 white."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cogview_pl.vqvae.config import Reconstruction


def reconstruction_loss(kind: Reconstruction, reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error over all elements, without clipping: a float32 scalar."""
    error = {Reconstruction.l1: F.l1_loss, Reconstruction.l2: F.mse_loss}[kind]
    return error(reconstruction.float(), images.float())


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: the mean over images of `-10 log10(mean squared error)`, a scalar.

    The reconstruction is clipped to 0..1 first, as in a saved image. Equal images give 100 dB.
    """
    error_B = (reconstruction.float().clamp(0, 1) - images.float()).square().flatten(1).mean(1)
    return -10 * error_B.clamp(min=1e-10).log10().mean()
