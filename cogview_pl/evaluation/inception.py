"""Inception v3 as a feature network, from a state dict: the weights that FID is defined with, or torchvision's.

FID's (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) are of a TensorFlow network of 2015, converted to the
names of torchvision. That network differs from torchvision's: 1008 classes, average pools that leave the border out
of the mean, and a maximum instead of a mean in its last block.

Shapes: B images, C channels, Y X positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from cogview_pl.errors import UserError
from cogview_pl.evaluation.state_dicts import fit

RESOLUTION = 299
"""Edge of the images that both networks are made for."""

_NUM_FEATURES = 2048
_FID, _TORCHVISION = 1008, 1000  # classes, by which the two are told apart
_TRAINING_ONLY = "AuxLogits."


def open_inception(weights: Mapping[str, Tensor], file: Path, key: str) -> nn.Module:
    """The network that a state dict is of.

    It takes float images `(B, 3, 299, 299)`, 0 … 1, and gives features `(B, 2048)` and logits `(B, 1008)` or
    `(B, 1000)`.

    Args:
        weights: the state dict.
        file: where it is from, for errors.
        key: of the configuration, for errors.

    Raises:
        UserError: it is of neither network; the message names tensors.
    """
    last = weights.get("fc.weight")
    shape = None if last is None else tuple(last.shape)
    if shape not in ((_FID, _NUM_FEATURES), (_TORCHVISION, _NUM_FEATURES)):
        raise UserError(
            f"{key}={file} holds weights of no network that is known here: fc.weight is "
            f"{shape or 'missing'}, that of Inception v3 is ({_FID}, {_NUM_FEATURES}) for FID's and "
            f"({_TORCHVISION}, {_NUM_FEATURES}) for torchvision's"
        )
    used = {name: tensor for name, tensor in weights.items() if not name.startswith(_TRAINING_ONLY)}
    fid = shape[0] == _FID
    with torch.device("meta"):  # the weights take the place of random ones that nobody needs
        network = _fid_network() if fid else _torchvision_network()
    fit(network, used, "the Inception v3 of FID" if fid else "torchvision's Inception v3", file, key)
    return (FIDInception if fid else TorchvisionInception)(network)


class _Inception(nn.Module):
    """A network cut before its last layer."""

    def __init__(self, network: Inception3) -> None:
        super().__init__()
        self.last = network.fc
        network.fc = nn.Identity()  # type: ignore[assignment]
        self.trunk = network.eval()


class FIDInception(_Inception):
    """Images `(B, 3, 299, 299)`, 0 … 1, to features and logits as the TensorFlow network gives them.

    Images are rounded to 256 levels first. The logits are without bias, as in the original Inception Score.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 2048)` and logits `(B, 1008)`."""
        features = self.trunk(((images * 255).round() - 128) / 128)
        return features, features @ self.last.weight.T


class TorchvisionInception(_Inception):
    """Images `(B, 3, 299, 299)`, 0 … 1, to features and logits as torchvision's network gives them.

    Its own preprocessing (ImageNet's mean and deviation, then `transform_input`) comes to a range of -1 … 1.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 2048)` and logits `(B, 1000)`."""
        features = self.trunk(images * 2 - 1)
        return features, self.last(features)


def _torchvision_network() -> Inception3:
    return Inception3(num_classes=_TORCHVISION, aux_logits=False, init_weights=False)


def _fid_network() -> Inception3:
    blocks: list[Any] = [BasicConv2d, _BlockA, InceptionB, _BlockC, InceptionD, _BlockE, InceptionAux]
    network = Inception3(num_classes=_FID, aux_logits=False, init_weights=False, inception_blocks=blocks)
    network.Mixed_7c = _LastBlock(_NUM_FEATURES)
    return network


# Private name of torchvision, checked against 0.29: `_forward` of the Inception blocks. Without it the Inception of FID
# would need its own copies of four blocks.
class _MeanInside:
    """A block of torchvision whose last branch begins with the mean of what lies inside the image.

    The block's own last branch is computed as well and dropped, which takes a tenth of the network's time and
    saves writing its other branches anew.
    """

    branch_pool: BasicConv2d

    def _forward(self, x: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x)  # type: ignore[misc]
        return [*branches, self.branch_pool(self._pool(x))]

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class _BlockA(_MeanInside, InceptionA):
    pass


class _BlockC(_MeanInside, InceptionC):
    pass


class _BlockE(_MeanInside, InceptionE):
    pass


class _LastBlock(_BlockE):
    """The block before the last layer, whose last branch begins with a maximum."""

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
