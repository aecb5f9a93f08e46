"""LPIPS against a direct implementation of its definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import vgg16

from cogview_pl.errors import UserError
from cogview_pl.evaluation.lpips import open_lpips

from .fixed import fixed_values, fixed_weights

CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(scope="module")
def network_weights() -> dict[str, Tensor]:
    """State dict of `vgg16.features` with torchvision's names."""
    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    return fixed_weights(nn.ModuleDict({"features": features}))


def linear_weights() -> dict[str, Tensor]:
    return {f"lin{i}.model.1.weight": fixed_values((1, size, 1, 1), i) for i, size in enumerate(CHANNELS)}


@pytest.fixture(scope="module")
def files(network_weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lpips")
    extra = {"classifier.6.bias": torch.zeros(1000)}  # torchvision's file also has the classifier
    save_file(network_weights | extra, folder / "vgg16.safetensors")
    torch.save(linear_weights(), folder / "vgg.pth")
    return [str(folder / "vgg16.safetensors"), str(folder / "vgg.pth")]


def by_definition(weights: dict[str, Tensor], image: Tensor, other: Tensor) -> float:
    """Distance of two images `(3, Y, X)`, computed in float64."""
    x = torch.stack((image, other)).double() * 2 - 1
    x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    layers = iter(zip(list(weights.values())[::2], list(weights.values())[1::2], strict=True))
    distance = 0.0
    for block, linear in zip((2, 2, 3, 3, 3), linear_weights().values(), strict=True):
        x = x if distance == 0 else F.max_pool2d(x, 2)
        for _ in range(block):
            weight, bias = next(layers)
            x = F.conv2d(x, weight.double(), bias.double(), padding=1).relu()
        unit = x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)
        squared = (unit[0] - unit[1]).square()
        distance += float((squared * linear[0].double()).sum(0).mean())
    return distance


def test_the_definition(files: list[str], network_weights: dict[str, Tensor]) -> None:
    measure = open_lpips(files, device="cpu", verify=True)
    images, others = fixed_values((2, 2, 3, 20, 36), 1)
    with torch.no_grad():
        found = measure(images, others)
        assert measure(images, images).tolist() == [0, 0]
    wanted = [by_definition(network_weights, *pair) for pair in zip(images, others, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=0)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-3)
    assert [len(part) for part in measure.sha256.split(",")] == [64, 64]


def test_other_files_are_named(files: list[str], tmp_path: Path) -> None:
    other = tmp_path / "alex.pth"
    torch.save({**linear_weights(), "lin1.model.1.weight": torch.ones(1, 192, 1, 1)}, other)
    for given, words in (
        ([files[0], str(other)], r"LPIPS for vgg16: lin1.model.1.weight has the shape \(1, 192, 1, 1\)"),
        ([files[1], files[0]], r"torchvision's vgg16: features.0.weight is missing, .* more"),
        ([files[0], "nowhere.pth"], "nowhere.pth does not exist"),
        (files[:1], "found 1 files; give two"),
    ):
        with pytest.raises(UserError, match=words) as error:
            open_lpips(given, device="cpu", verify=True)
        assert "\n" not in str(error.value) and str(error.value).startswith("evaluate.lpips=")
