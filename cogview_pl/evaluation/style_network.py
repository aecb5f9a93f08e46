"""A small feature network for the toy world: it classifies the style of an image, and learns its attributes.

Shapes: B images, F features, S styles, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.checkpoints.model_folder import FEATURE_NETWORK, find_model_folder, load_model, save_model
from cogview_pl.evaluation.image_files import blur
from cogview_pl.toy_world.scene import COLOURS, PLACES, SHAPES, SIZES, Scene

ATTRIBUTES = (*COLOURS, *SHAPES, *SIZES, *PLACES)
"""Attributes that the network learns besides the style, so that its features depend on the content too."""

_BLURS_PER_BATCH = 4
_LARGEST = 4096  # largest edge of images in pixels, so that a manipulated file cannot exhaust memory
_GRID = 4  # the last feature map is pooled to 4 x 4 cells, which keeps places apart


class ToyNetwork(nn.Module):
    """Maps float images `(B, 3, Y, X)`, 0 … 1, to features `(B, F)` and style logits `(B, S)`.

    Args:
        hidden_size: channels of the first convolution; each of the next three doubles them.
        num_features: F.
        num_styles: S.
    """

    def __init__(self, hidden_size: int, num_features: int, num_styles: int) -> None:
        super().__init__()
        channels = [3, *(hidden_size * 2**step for step in range(4))]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.features = nn.Linear(channels[-1] * _GRID**2, num_features)
        self.styles = nn.Linear(num_features, num_styles)
        self.attributes = nn.Linear(num_features, len(ATTRIBUTES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and style logits."""
        maps = F.adaptive_avg_pool2d(self.convolutions(images * 2 - 1), _GRID)
        features_BF = F.relu(self.features(maps.flatten(1)))
        return features_BF, self.styles(features_BF)


def attributes_of(scene: Scene) -> Tensor:
    """Whether each of `ATTRIBUTES` occurs in a scene: float 0 or 1, `(A,)`."""
    named = {value for thing in scene.objects for value in thing.spec}
    return torch.tensor([float(attribute in named) for attribute in ATTRIBUTES])


def train_network(
    network: ToyNetwork,
    images: Tensor,
    styles: Tensor,
    attributes: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    blur_radius: float,
    noise: float,
    tint: float,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train in place, on images with blur, noise and colour shifts, because reconstructions have them too.

    Args:
        network: the network.
        images: uint8 `(N, 3, Y, X)`.
        styles: style numbers, int64 `(N,)`.
        attributes: float 0 or 1, `(N, A)`.
        epochs, batch_size, lr: passes over the images; images per step; highest learning rate.
        blur_radius, noise, tint: maximum of the blur (pixels), of the noise (standard deviation) and of the colour
            shift; the amounts are random.
        seed: seed of the order, of blur, of noise and of colour shifts.
        on_step: called after each step.
    """
    random = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps_per_epoch)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=random).split(batch_size):
            worse = _worsened(images[chosen].float() / 255, blur_radius, noise, tint, random)
            features_BF, styles_BS = network(worse)
            loss = F.cross_entropy(styles_BS, styles[chosen])
            loss = loss + F.binary_cross_entropy_with_logits(network.attributes(features_BF), attributes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step()
    network.eval()


def _worsened(images: Tensor, blur_radius: float, noise: float, tint: float, random: torch.Generator) -> Tensor:
    """Images with random blur, noise and colour shift; amounts vary within a batch, so batch norm sees a stable mix."""
    parts = images.chunk(_BLURS_PER_BATCH)
    radii = (torch.rand(len(parts), generator=random) * blur_radius).tolist()
    softer = torch.cat([blur(part, radius) for part, radius in zip(parts, radii, strict=True)])
    shift = tint * (2 * torch.rand(len(images), 3, 1, 1, generator=random) - 1)
    level = noise * torch.rand(len(images), 1, 1, 1, generator=random)
    return (softer + shift + level * torch.randn(images.shape, generator=random)).clamp(0, 1)


def save_network(network: ToyNetwork, folder: Path, resolution: int, classes: Sequence[str]) -> None:
    """Write a model folder.

    Args:
        network: the network.
        folder: the folder; it is made if it is missing.
        resolution: edge of its training images in pixels.
        classes: names of its logits.
    """
    sizes = {"hidden_size": network.convolutions[0].out_channels, "num_features": network.features.out_features}
    settings = {"resolution": resolution, "classes": list(classes), "toy_network": sizes}
    save_model(folder, network, FEATURE_NETWORK, settings)


def load_network(path: Path, key: str, *, verify: bool) -> tuple[ToyNetwork, int, tuple[str, ...]]:
    """The network of a run folder or model folder, the edge of its images in pixels, and the names of its logits.

    Args:
        path: the folder.
        key: configuration key, for errors.
        verify: see `load_model`.

    Raises:
        UserError: the model folder is missing, damaged or of another kind.
    """
    network, settings = load_model(find_model_folder(path, key), FEATURE_NETWORK, key, _build, verify=verify)
    return network, settings["resolution"], tuple(settings["classes"])


def _build(settings: dict[str, Any]) -> ToyNetwork:
    """The network of saved settings; raises KeyError, TypeError or ValueError if they are invalid."""
    resolution, classes = settings["resolution"], settings["classes"]
    if type(resolution) is not int or not 1 <= resolution <= _LARGEST:
        raise ValueError(f"resolution is {resolution!r}, not a whole number up to {_LARGEST}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {classes!r}, not a list of names")
    return ToyNetwork(**settings["toy_network"], num_styles=len(classes))
