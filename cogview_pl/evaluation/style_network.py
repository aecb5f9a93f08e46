"""A small feature network for the toy world: it classifies the style of an image, and learns its attributes.

Shapes: B images, F features, S styles, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogview_pl.evaluation.config import FeaturesConfig
from cogview_pl.evaluation.convolutions import ConvolutionalNetwork, worsened
from cogview_pl.toy_world.scene import COLOURS, PLACES, SHAPES, SIZES, Scene

ATTRIBUTES = (*COLOURS, *SHAPES, *SIZES, *PLACES)
"""Attributes that the network learns besides the style, so that its features depend on the content too."""


class ToyNetwork(ConvolutionalNetwork):
    """Maps float images `(B, 3, Y, X)`, 0 … 1, to features `(B, F)` and style logits `(B, S)`.

    Args:
        hidden_size, num_features: see `ConvolutionalNetwork`.
        num_styles: S.
    """

    def __init__(self, hidden_size: int, num_features: int, num_styles: int) -> None:
        super().__init__(hidden_size, num_features)
        self.styles = nn.Linear(num_features, num_styles)
        self.attributes = nn.Linear(num_features, len(ATTRIBUTES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and style logits."""
        features_BF = self.features_of(images)
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
    options: FeaturesConfig,
    *,
    batch_size: int,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train in place, on images that are `worsened`.

    Args:
        network: the network.
        images: uint8 `(N, 3, Y, X)`.
        styles: style numbers, int64 `(N,)`.
        attributes: float 0 or 1, `(N, A)`.
        options: passes over the images, highest learning rate, augmentation.
        batch_size: images per step.
        seed: seed of the order and of the augmentation.
        on_step: called after each step.
    """
    random = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr)
    total = options.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total)
    network.train()
    for _ in range(options.epochs):
        for chosen in torch.randperm(len(images), generator=random).split(batch_size):
            features_BF, styles_BS = network(worsened(images[chosen].float() / 255, options, random))
            loss = F.cross_entropy(styles_BS, styles[chosen])
            loss = loss + F.binary_cross_entropy_with_logits(network.attributes(features_BF), attributes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step()
    network.eval()
