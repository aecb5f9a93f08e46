"""Reconstruction losses of the image tokenizer and PSNR. Images are `(B, 3, Y, X)`, 0 black .. 1 white."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(kind: Literal["l1", "l2"], reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error over all elements, without clipping: a float32 scalar."""
    error = {"l1": F.l1_loss, "l2": F.mse_loss}[kind]
    return error(reconstruction.float(), images.float())


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: the mean over images of `-10 log10(mean squared error)`, a scalar.

    The reconstruction is clipped to 0..1 first, as when it is saved. Equal images count as 100 dB.
    """
    error_B = (reconstruction.float().clamp(0, 1) - images.float()).square().flatten(1).mean(1)
    return -10 * error_B.clamp(min=1e-10).log10().mean()
