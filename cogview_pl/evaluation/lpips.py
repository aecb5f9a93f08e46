"""LPIPS: perceptual distance of two images by features of VGG-16 (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

The user gives two files: torchvision's state dict of vgg16, and the linear weights that the authors fitted to human
judgements (`vgg.pth` of their package, version 0.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchvision.models import vgg16

from cogview_pl.errors import UserError
from cogview_pl.evaluation.feature_distance import FeatureDistance
from cogview_pl.evaluation.state_dicts import fit, read_state_dict, sha256_of

KEY = "evaluate.lpips"
SMALLEST = 16
"""Smallest edge of the images in pixels, because the network halves them four times."""

_TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
"""Layers of `vgg16.features` that are compared (relu1_2 … relu5_3) → their channels."""

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_SHIFT, _SCALE = [2 * mean - 1 for mean in _MEAN], [2 * deviation for deviation in _DEVIATION]  # for a range of -1 … 1


class LPIPS(FeatureDistance):
    """Perceptual distance of images from other images, float `(B,)`, 0 for equal images; edges of 16 pixels at least.

    Its weights are empty until files are loaded.
    """

    sha256 = ""
    """Hashes of the two weight files, separated by a comma."""

    def __init__(self) -> None:
        layers = vgg16(weights=None, init_weights=False).features
        super().__init__(layers, _TAPS, mean=_SHIFT, deviation=_SCALE)

    def load_network(self, file: Path, key: str, *, verify: bool) -> None:
        """Load torchvision's state dict of vgg16; raises UserError naming `key` if the file is none."""
        network = read_state_dict(file, key, verify=verify)
        used = {name: tensor for name, tensor in network.items() if not name.startswith("classifier.")}
        fit(nn.ModuleDict({"features": self.features}), used, "torchvision's vgg16", file, key)

    def load_linear(self, file: Path, key: str, *, verify: bool) -> None:
        """Load the linear weights of the authors; raises UserError naming `key` if the file has none."""
        linear = read_state_dict(file, key, verify=verify)
        fit(_as_saved(self.linear), linear, "the linear weights of LPIPS for vgg16", file, key)


def open_lpips(files: Sequence[str], *, device: str, verify: bool) -> LPIPS:
    """LPIPS with the weights of two files.

    Args:
        files: torchvision's state dict of vgg16, then the state dict of the linear weights.
        device: device of the network.
        verify: see `read_state_dict`.

    Raises:
        UserError: there are not two files; a file is missing, damaged or no such state dict.
    """
    if len(files) != 2:
        raise UserError(
            f"{KEY}={list(files)}: found {len(files)} files; give two, vgg16's state dict and LPIPS's linear weights"
        )
    network_file, linear_file = map(Path, files)
    with torch.device("meta"):  # no random weights are made, because the files replace them
        model = LPIPS()
    model.load_network(network_file, KEY, verify=verify)
    model.load_linear(linear_file, KEY, verify=verify)
    model.sha256 = ",".join(map(sha256_of, (network_file, linear_file)))
    return model.eval().to(device)


def _as_saved(linear: nn.ModuleList) -> nn.Module:
    """The layers under the names of the authors' file, such as lin0.model.1, where model.0 is dropout."""
    models = (nn.ModuleDict({"model": nn.Sequential(nn.Identity(), layer)}) for layer in linear)
    return nn.ModuleDict({f"lin{number}": model for number, model in enumerate(models)})
