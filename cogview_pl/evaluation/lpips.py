"""LPIPS: how different two images look, by the features of VGG-16 (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

From two files that the user has: torchvision's state dict of vgg16, and the linear weights that the authors fitted to
what people see (`vgg.pth` of their package, version 0.1).

Shapes: B images, C channels, Y X positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from cogview_pl.errors import UserError
from cogview_pl.evaluation.state_dicts import fit, read_state_dict, sha256_of

KEY = "evaluate.lpips"
SMALLEST = 16
"""Least edge of the images: the network halves them four times."""

_TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
"""Layers of `vgg16.features` that are compared, relu1_2 … relu5_3, and their channels."""

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_SHIFT, _SCALE = [2 * mean - 1 for mean in _MEAN], [2 * deviation for deviation in _DEVIATION]  # for a range of -1 … 1
_TINY = 1e-10  # keeps features that are all zero from a division by zero


class LPIPS(nn.Module):
    """Distance of images from others, float `(B,)`, 0 for equal ones."""

    sha256 = ""
    """Of the two files that the weights are from, with a comma between."""

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg16(weights=None, init_weights=False).features[: max(_TAPS) + 1]
        self.linear = nn.ModuleList(nn.Conv2d(channels, 1, 1, bias=False) for channels in _TAPS.values())

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances `(B,)` of images `(B, 3, Y, X)`, float 0 … 1, Y and X at least 16."""
        total = images.new_zeros(len(images))
        pairs = zip(self._look(images), self._look(others), self.linear, strict=True)
        for image_BCYX, other_BCYX, linear in pairs:
            total = total + linear((image_BCYX - other_BCYX) ** 2).mean((1, 2, 3))
        return total

    def _look(self, images: Tensor) -> list[Tensor]:
        """Features `(B, C, Y, X)` of the compared layers, of length 1 over the channels."""
        shift, scale = (images.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x = (images * 2 - 1 - shift) / scale
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in _TAPS:
                found.append(x / (x.norm(dim=1, keepdim=True) + _TINY))
        return found


def open_lpips(files: Sequence[str], *, device: str, verify: bool) -> LPIPS:
    """The measure that two files hold.

    Args:
        files: torchvision's state dict of vgg16, then that of the linear weights.
        device: where to run it.
        verify: see `read_state_dict`.

    Raises:
        UserError: there are not two files, one is missing or damaged, or holds something else.
    """
    if len(files) != 2:
        raise UserError(
            f"{KEY}={list(files)}: found {len(files)} files; give two, vgg16's state dict and LPIPS's linear weights"
        )
    network_file, linear_file = map(Path, files)
    with torch.device("meta"):  # the weights take the place of random ones that nobody needs
        model = LPIPS()
    network = read_state_dict(network_file, KEY, verify=verify)
    used = {name: tensor for name, tensor in network.items() if not name.startswith("classifier.")}
    fit(nn.ModuleDict({"features": model.features}), used, "torchvision's vgg16", network_file, KEY)
    linear = read_state_dict(linear_file, KEY, verify=verify)
    fit(_as_saved(model.linear), linear, "the linear weights of LPIPS for vgg16", linear_file, KEY)
    model.sha256 = ",".join(map(sha256_of, (network_file, linear_file)))
    return model.eval().to(device)


def _as_saved(linear: nn.ModuleList) -> nn.Module:
    """The layers by their names in the authors' file, where a dropout comes before each: lin0.model.1."""
    models = (nn.ModuleDict({"model": nn.Sequential(nn.Identity(), layer)}) for layer in linear)
    return nn.ModuleDict({f"lin{number}": model for number, model in enumerate(models)})
