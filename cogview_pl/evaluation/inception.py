"""Inception v3 as a feature network, from a state dict: the weights of the definition of FID, or torchvision's.

The weights of FID (Heusel et al. 2017, https://arxiv.org/abs/1706.08500) come from a TensorFlow network of 2015,
converted to the names of torchvision. It differs from torchvision's network: it has 1008 classes, its average pools
leave padding out of the mean, and its last block has a maximum instead of a mean.

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
"""Edge of the input images of both networks, in pixels."""

_NUM_FEATURES = 2048
_FID, _TORCHVISION = 1008, 1000  # number of classes; it tells the two networks apart
_TRAINING_ONLY = "AuxLogits."


def open_inception(weights: Mapping[str, Tensor], file: Path, key: str) -> nn.Module:
    """The network of a state dict.

    It maps float images `(B, 3, 299, 299)`, 0 … 1, to features `(B, 2048)` and logits `(B, 1008)` or `(B, 1000)`.

    Args:
        weights: the state dict.
        file: file of the state dict, for errors.
        key: configuration key, for errors.

    Raises:
        UserError: the state dict fits neither network; the message names tensors.
    """
    last = weights.get("fc.weight")
    shape = None if last is None else tuple(last.shape)
    if shape not in ((_FID, _NUM_FEATURES), (_TORCHVISION, _NUM_FEATURES)):
        raise UserError(
            f"{key}={file} holds weights of an unknown network: fc.weight is {shape or 'missing'}; give Inception v3 "
            f"of FID ({_FID}, {_NUM_FEATURES}) or of torchvision ({_TORCHVISION}, {_NUM_FEATURES})"
        )
    used = {name: tensor for name, tensor in weights.items() if not name.startswith(_TRAINING_ONLY)}
    fid = shape[0] == _FID
    with torch.device("meta"):  # no random weights are made, because the file replaces them
        network = _fid_network() if fid else Inception3(num_classes=_TORCHVISION, aux_logits=False, init_weights=False)
    fit(network, used, "the Inception v3 of FID" if fid else "torchvision's Inception v3", file, key)
    return (FIDInception if fid else TorchvisionInception)(network)


class _Inception(nn.Module):
    """A network without its last layer, which is kept apart."""

    def __init__(self, network: Inception3) -> None:
        super().__init__()
        self.last = network.fc
        network.fc = nn.Identity()  # type: ignore[assignment]
        self.trunk = network.eval()


class FIDInception(_Inception):
    """Features and logits of the TensorFlow network, from images `(B, 3, 299, 299)`, 0 … 1.

    Images are rounded to 256 levels first. Logits have no bias, as in the original Inception Score.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 2048)` and logits `(B, 1008)`."""
        features = self.trunk(((images * 255).round() - 128) / 128)
        return features, features @ self.last.weight.T


class TorchvisionInception(_Inception):
    """Features and logits of torchvision's network, from images `(B, 3, 299, 299)`, 0 … 1.

    Images are scaled to -1 … 1. Torchvision's preprocessing (ImageNet's mean and deviation, then `transform_input`)
    has the same result.
    """

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features `(B, 2048)` and logits `(B, 1000)`."""
        features = self.trunk(images * 2 - 1)
        return features, self.last(features)


def _fid_network() -> Inception3:
    blocks: list[Any] = [BasicConv2d, _BlockA, InceptionB, _BlockC, InceptionD, _BlockE, InceptionAux]
    network = Inception3(num_classes=_FID, aux_logits=False, init_weights=False, inception_blocks=blocks)
    network.Mixed_7c = _LastBlock(_NUM_FEATURES)
    return network


# Private name of torchvision, checked against 0.29: `_forward` of the Inception blocks. Without it the Inception of FID
# would need its own copies of four blocks.
class _MeanInside:
    """A block of torchvision with another pool in its last branch: the mean without padding.

    The last branch of the original block is computed too and dropped. That costs a tenth of the network's time, and
    avoids copies of the other branches.
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
    """The last block; its last branch starts with a maximum."""

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
