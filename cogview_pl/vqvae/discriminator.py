"""A patch discriminator: one logit for each patch of an image, high for real images (Isola et al. 2017, PatchGAN).

Shapes: B images, Y X their edges, y x the grid of logits, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cogview_pl.vqvae.config import DiscriminatorNorm

_SLOPE = 0.2  # of the leaky ReLU for negative inputs
_WIDEST = 8  # channels of the last layers, as a multiple of those of the first
_GROUPS = 32  # of a group norm, where the channels can be divided by it
_INIT_STD = 0.02  # of the filters: logits start near 0
_LAST = 2  # convolutions without a stride, each of which shortens an edge by one


class PatchDiscriminator(nn.Module):
    """Maps images `(B, 3, Y, X)`, 0 black .. 1 white, to logits `(B, 1, y, x)`.

    Strided 4x4 convolutions, norm and leaky ReLU, then two convolutions without a stride. Logits of an image do not
    depend on the other images of the batch.

    Args:
        hidden_size: channels of the first convolution; each strided one doubles them, up to eight times.
        layers: strided convolutions. A logit sees 16, 34, 70, 142 pixels along an edge with 1, 2, 3, 4 of them.
        norm: norm after all convolutions but the first and the last.

    Attributes:
        smallest_edge: edge of the smallest images in pixels.
    """

    def __init__(self, *, hidden_size: int, layers: int, norm: DiscriminatorNorm) -> None:
        super().__init__()
        self.smallest_edge = smallest_edge(layers)
        widths = [hidden_size * min(2**depth, _WIDEST) for depth in range(layers + 1)]
        built: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE, inplace=True)]
        for depth, width in enumerate(widths[1:], start=1):
            stride = 2 if depth < layers else 1
            built.append(nn.Conv2d(widths[depth - 1], width, 4, stride=stride, padding=1))
            if norm == DiscriminatorNorm.group:
                built.append(nn.GroupNorm(math.gcd(_GROUPS, width), width))
            built.append(nn.LeakyReLU(_SLOPE, inplace=True))
        built.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*built)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=_INIT_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.layers(images * 2 - 1)
        return logits


def smallest_edge(layers: int) -> int:
    """Edge in pixels of the smallest images of a discriminator with this number of strided convolutions."""
    return (_LAST + 1) * 2**layers


def build_discriminator(*, hidden_size: int, layers: int, norm: DiscriminatorNorm) -> PatchDiscriminator:
    """A discriminator with random weights that leaves torch's random numbers as they were.

    A run then has the numbers of a run without a discriminator, until the discriminator starts.
    """
    with torch.random.fork_rng(devices=[]):
        return PatchDiscriminator(hidden_size=hidden_size, layers=layers, norm=norm)
