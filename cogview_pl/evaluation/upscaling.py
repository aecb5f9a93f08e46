"""How well an upscaled image matches the true one: PSNR, error along edges, seams between windows.

Shapes: B images, Y X pixels. Images are float `(B, 3, Y, X)` in 0 … 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, inf, nan
from statistics import fmean
from typing import NamedTuple

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


class UpscaledImage(NamedTuple):
    """What the metrics of a set need of one image."""

    psnr: float
    """Peak signal-to-noise ratio, dB."""
    seam_error: float
    """Sum of the absolute errors of the pixels near an edge and near a border between windows."""
    seam_pixels: int
    other_error: float
    """The same sum for the other pixels near an edge."""
    other_pixels: int


def compare_upscaled(images: Tensor, truth: Tensor, owners: Tensor | None = None) -> list[UpscaledImage]:
    """Compare upscaled images with the true ones.

    Args:
        images, truth: of the same shape.
        owners: number of the window that decoded each code, int64 `(y, x)`; the borders follow from it.
    """
    error_BYX = (images - truth).abs().mean(1)
    edges_BYX = _near_edges(truth)
    seams_YX = torch.zeros(truth.shape[-2:], dtype=torch.bool) if owners is None else _near_seams(owners, truth.shape)
    found = []
    for image, true, error_YX, edges_YX in zip(images, truth, error_BYX.double(), edges_BYX, strict=True):
        at_seam, elsewhere = error_YX[edges_YX & seams_YX], error_YX[edges_YX & ~seams_YX]
        ratio = float(psnr(image[None], true[None]))
        found.append(UpscaledImage(ratio, float(at_seam.sum()), len(at_seam), float(elsewhere.sum()), len(elsewhere)))
    return found


def judge_upscaling(images: Iterable[UpscaledImage]) -> Upscaling:
    """Metrics of a set of images, at least one."""
    ratios, seam_errors, seam_pixels, other_errors, other_pixels = zip(*images, strict=True)
    seam, other, at_seam, elsewhere = fsum(seam_errors), fsum(other_errors), sum(seam_pixels), sum(other_pixels)
    return Upscaling(
        psnr=fmean(ratios),
        edge_error=_ratio(seam + other, at_seam + elsewhere),
        seam_ratio=_ratio(_ratio(seam, at_seam), _ratio(other, elsewhere)),
    )


def _ratio(one: float, other: float) -> float:
    if other:
        return one / other
    return inf if one > 0 else nan


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
