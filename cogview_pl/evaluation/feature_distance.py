"""Distance of two images by the feature maps of a network (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

Shapes: B images, C channels, Y X positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_TINY = 1e-10  # avoids a division by zero if all features are zero


class FeatureDistance(nn.Module):
    """Distance of images from other images, float `(B,)`, 0 for equal images.

    Feature maps have length 1 over channels. Of each compared layer it takes the mean over positions of a weighted sum
    of the squared differences over channels, and it adds the layers.

    Args:
        layers: the network.
        taps: number of a compared layer → its channels.
        mean, deviation: of each colour, which the network's inputs are normalised by, on the scale -1 … 1.

    Attributes:
        linear: weights of the channels of each compared layer, 1x1 convolutions.
    """

    def __init__(
        self, layers: nn.Sequential, taps: Mapping[int, int], *, mean: Sequence[float], deviation: Sequence[float]
    ) -> None:
        super().__init__()
        self.features = layers[: max(taps) + 1]
        self.linear = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in taps.values())
        self._taps = tuple(taps)
        self._mean, self._deviation = mean, deviation

    def weigh_channels_equally(self) -> None:
        """Sum the squared differences over channels."""
        for layer in self._linear_layers():
            layer.weight = nn.Parameter(torch.ones(1, layer.in_channels, 1, 1), requires_grad=False)

    def weigh_layers(self, weights: Sequence[float]) -> None:
        """Multiply the distance of each compared layer."""
        for layer, weight in zip(self._linear_layers(), weights, strict=True):
            layer.weight = nn.Parameter(layer.weight.detach() * weight, requires_grad=False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances `(B,)` of images `(B, 3, Y, X)`, float 0 … 1."""
        total = images.new_zeros(len(images))
        pairs = zip(self._look(images), self._look(others), self.linear, strict=True)
        for image_BCYX, other_BCYX, linear in pairs:
            total = total + linear((image_BCYX - other_BCYX) ** 2).mean((1, 2, 3))
        return total

    def _linear_layers(self) -> list[nn.Conv2d]:
        return [layer for layer in self.linear if isinstance(layer, nn.Conv2d)]

    def _look(self, images: Tensor) -> list[Tensor]:
        """Features `(B, C, Y, X)` of the compared layers, normalised to length 1 over channels."""
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (self._mean, self._deviation))
        x = (images * 2 - 1 - mean) / deviation
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self._taps:
                found.append(x / (x.norm(dim=1, keepdim=True) + _TINY))
        return found
