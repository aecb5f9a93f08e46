"""The convolutions that our small feature networks have in common, and the augmentation of their training images.

Shapes: B images, F features.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.evaluation.config import FeaturesConfig
from cogview_pl.evaluation.image_files import blur

SMALLEST = 16
"""Least edge of images in pixels: four convolutions halve it."""

_BLURS_PER_BATCH = 4
_GRID = 4  # the last feature map is pooled to 4 x 4 cells, which keeps places apart


class ConvolutionalNetwork(nn.Module):
    """Maps float images `(B, 3, Y, X)`, 0 … 1, to features `(B, F)`.

    Args:
        hidden_size: channels of the first convolution; each of the next three doubles them.
        num_features: F.
    """

    def __init__(self, hidden_size: int, num_features: int) -> None:
        super().__init__()
        channels = [3, *(hidden_size * 2**step for step in range(4))]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.features = nn.Linear(channels[-1] * _GRID**2, num_features)

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of the constructor."""
        return {"hidden_size": self.convolutions[0].out_channels, "num_features": self.features.out_features}  # type: ignore[dict-item]

    def features_of(self, images: Tensor) -> Tensor:
        """Features of images."""
        maps = F.adaptive_avg_pool2d(self.convolutions(images * 2 - 1), _GRID)
        return F.relu(self.features(maps.flatten(1)))


def worsened(images: Tensor, options: FeaturesConfig, random: torch.Generator) -> Tensor:
    """Images with random blur, noise and colour shift, because reconstructions have them too.

    Amounts vary within a batch, so batch norm sees a stable mix.

    Args:
        images: float `(B, 3, Y, X)`, 0 … 1.
        options: `blur`, `noise` and `tint` are the largest amounts.
        random: where the amounts come from.
    """
    parts = images.chunk(_BLURS_PER_BATCH)
    radii = (torch.rand(len(parts), generator=random) * options.blur).tolist()
    softer = torch.cat([blur(part, radius) for part, radius in zip(parts, radii, strict=True)])
    shift = options.tint * (2 * torch.rand(len(images), 3, 1, 1, generator=random) - 1)
    level = options.noise * torch.rand(len(images), 1, 1, 1, generator=random)
    return (softer + shift + level * torch.randn(images.shape, generator=random)).clamp(0, 1)
