"""How well an upscaled image matches the true one: PSNR, error along edges, seams between windows.

Shapes: B images, Y X pixels. Images are float `(B, 3, Y, X)` in 0 … 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cogview_pl.vqvae.losses import psnr

_EDGE_STEP = 0.1  # two neighbouring pixels are an edge of the true image if one channel differs by more than this
_REACH = 2  # a pixel is near an edge or a border of windows up to this distance


@dataclass(frozen=True)
class Upscaling:
    """Metrics of a set of upscaled images."""

    psnr: float
    """Mean over images of the peak signal-to-noise ratio, dB."""
    edge_error: float
    """Mean absolute error of the pixels within 2 pixels of an edge of the true image, 0 … 1."""
    seam_ratio: float
    """`edge_error` of the pixels near a border between windows, divided by that of the others; NaN without borders."""


def judge_upscaling(images: Tensor, truth: Tensor, owners: Tensor | None = None) -> Upscaling:
    """Compare upscaled images with the true ones.

    Args:
        images, truth: of the same shape.
        owners: number of the window that decoded each code, int64 `(y, x)`; the borders follow from it.
    """
    error_BYX = (images - truth).abs().mean(1)
    edges_BYX = _near_edges(truth)
    seams_YX = torch.zeros(truth.shape[-2:], dtype=torch.bool) if owners is None else _near_seams(owners, truth.shape)
    at_seam, elsewhere = error_BYX[edges_BYX & seams_YX], error_BYX[edges_BYX & ~seams_YX]
    return Upscaling(
        psnr=float(psnr(images, truth)),
        edge_error=float(error_BYX[edges_BYX].mean()),
        seam_ratio=float(at_seam.mean() / elsewhere.mean()),
    )


def _near_edges(truth: Tensor) -> Tensor:
    """Pixels `(B, Y, X)` near an edge."""
    step_BYX = torch.zeros(len(truth), *truth.shape[-2:])
    step_BYX[:, 1:] = (truth[:, :, 1:] - truth[:, :, :-1]).abs().amax(1)
    step_BYX[:, :, 1:] = step_BYX[:, :, 1:].maximum((truth[..., 1:] - truth[..., :-1]).abs().amax(1))
    return _widened((step_BYX > _EDGE_STEP).float())


def _near_seams(owners: Tensor, shape: torch.Size) -> Tensor:
    """Pixels `(Y, X)` near a border between codes of different windows."""
    owner_YX = F.interpolate(owners[None, None].float(), size=shape[-2:], mode="nearest")[0, 0]
    border_YX = torch.zeros(shape[-2:])
    border_YX[1:] = (owner_YX[1:] != owner_YX[:-1]).float()
    border_YX[:, 1:] = border_YX[:, 1:].maximum((owner_YX[:, 1:] != owner_YX[:, :-1]).float())
    return _widened(border_YX[None])[0]


def _widened(mask_BYX: Tensor) -> Tensor:
    return F.max_pool2d(mask_BYX[:, None], 2 * _REACH + 1, stride=1, padding=_REACH)[:, 0] > 0
