"""Enlarged images that agree with the small ones, by back-projection (Irani and Peleg 1991).

Codes lose detail that the small image still has. What the enlarged image, made small again, differs by is added to it.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize


def resized(images: Tensor, edge: int) -> Tensor:
    """Images `(B, 3, Y, X)`, 0 … 1, resized to `(B, 3, edge, edge)` (bicubic, antialiased)."""
    return resize(images, [edge, edge], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)


def consistent(large: Tensor, small: Tensor, share: float) -> Tensor:
    """Enlarged images `(B, 3, 2Y, 2Y)`, float 0 … 1, closer to the small ones `(B, 3, Y, Y)`.

    Args:
        large: the enlarged images.
        small: the small images.
        share: 0 leaves the enlarged images as they are, 1 adds all of the difference.
    """
    if not share:
        return large
    edge = small.shape[-1]
    difference = small - resize(large, [edge, edge], InterpolationMode.BICUBIC, antialias=True)
    enlarged = resize(difference, list(large.shape[-2:]), InterpolationMode.BICUBIC, antialias=True)
    return (large + share * enlarged).clamp(0, 1)
