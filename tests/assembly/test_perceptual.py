"""The perceptual loss from files: which network it compares, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import vgg16

from cogview_pl.assembly.perceptual import check_perceptual, perceptual_loss
from cogview_pl.errors import UserError
from cogview_pl.evaluation.caption_network import CaptionNetwork
from cogview_pl.evaluation.feature_folder import TrainedOn, save_caption_network, save_toy_network
from cogview_pl.evaluation.lpips import open_lpips
from cogview_pl.evaluation.style_network import ToyNetwork
from cogview_pl.tasks.fit_image_tokenizer import check
from cogview_pl.vqvae.config import PerceptualConfig, PerceptualNetwork

from ..composed import composed
from ..evaluation.fixed import fixed_values, fixed_weights

KEY = "image_tokenizer.perceptual"
CHANNELS = (64, 128, 256, 512, 512)


def options(**changed: object) -> PerceptualConfig:
    given = {"network": PerceptualNetwork.vgg, "weight": 2.0, "layer_weights": [1.0] * 5, **changed}
    return PerceptualConfig(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("vgg")
    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    save_file(fixed_weights(nn.ModuleDict({"features": features})), folder / "vgg16.safetensors")
    linear = {f"lin{i}.model.1.weight": fixed_values((1, size, 1, 1), i) for i, size in enumerate(CHANNELS)}
    torch.save(linear, folder / "vgg.pth")
    return str(folder / "vgg16.safetensors"), str(folder / "vgg.pth")


@torch.no_grad()
def test_with_linear_weights_it_is_lpips(files: tuple[str, str]) -> None:
    """Factors of layers scale their parts."""
    images, others = fixed_values((2, 2, 3, 16, 20), 1)
    expected = open_lpips(files, device="cpu", verify=True)(images, others).mean().item()
    network, linear = files
    loss = perceptual_loss(options(path=network, linear=linear), "outputs", verify=True)
    assert loss(images, others).item() == pytest.approx(expected, rel=1e-5)
    parts = []
    for layer in range(5):
        weights = [float(layer == one) for one in range(5)]
        part = perceptual_loss(options(path=network, linear=linear, layer_weights=weights), "", verify=False)
        parts.append(part(images, others).item())
    assert sum(parts) == pytest.approx(expected, rel=1e-5) and 0 not in parts
    assert not any(parameter.requires_grad for parameter in loss.parameters())


@torch.no_grad()
@pytest.mark.parametrize("of", ["toy", "captions"])
def test_it_compares_all_layers_of_a_network_of_task_features(of: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ToyNetwork(4, 3, 2) if of == "toy" else CaptionNetwork(4, 3, 2)
    folder, trained_on = tmp_path / "run" / "model", TrainedOn("a.B", 8, "0")
    if isinstance(network, ToyNetwork):
        save_toy_network(network, folder, 32, ["a", "b"], trained_on)
    else:
        save_caption_network(network, folder, 32, trained_on)
    given = options(network=PerceptualNetwork.features, path=str(tmp_path / "run"), layer_weights=[1.0, 0.0, 0.0, 2.0])
    loss = perceptual_loss(given, "outputs", verify=True)
    images, others = torch.rand(2, 3, 3, 32, 32).unbind()
    network.eval()
    expected = torch.zeros(())
    for depth, weight in ((1, 1.0), (4, 2.0)):
        maps = [network.convolutions[: 3 * depth](x * 2 - 1) for x in (images, others)]
        one, other = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-10) for x in maps)
        expected += weight * (one - other).square().sum(1).mean()
    assert loss(images, others).item() == pytest.approx(expected.item(), rel=1e-4)


def test_errors_name_the_key(files: tuple[str, str], tmp_path: Path) -> None:
    features = PerceptualNetwork.features
    for given, words in (
        (options(path="nowhere.pth"), f"{KEY}.path=nowhere.pth does not exist"),
        (options(path=files[0], linear=files[0]), f"{KEY}.linear={files[0]} does not fit the linear weights"),
        (options(path=files[0], layer_weights=[1.0]), rf"{KEY}.layer_weights=\[1.0\]: the network has 5"),
        (options(network=features), f"{KEY}.path"),
    ):
        with pytest.raises(UserError, match=words):
            perceptual_loss(given, str(tmp_path / "outputs"), verify=True)
    for given, edge, words in (
        (options(), 64, f"{KEY}.path is null"),
        (options(path=files[0]), 8, "16 pixels at least"),
        (options(network=features, linear="a"), 64, f"{KEY}.linear=a belongs to vgg16"),
    ):
        with pytest.raises(UserError, match=words):
            check_perceptual(given, edge)


def test_recipes_with_a_perceptual_loss() -> None:
    run = ("task=vqvae", "trainer.max_steps=2000", "plan.strict=false")
    with pytest.raises(UserError, match=rf"{KEY}\.path is null"):
        check(composed(*run, "image_tokenizer=small_vgg_gan"))
    check(composed(*run, "image_tokenizer=small_vgg_gan", f"{KEY}.path=vgg16.pth"))
    check(composed(*run, "image_tokenizer=small_gan", "image_tokenizer/perceptual=features"))
