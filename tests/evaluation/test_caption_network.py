"""The network that learns from captions: its metrics, its training, and folders of all feature networks."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogview_pl.checkpoints.model_folder import FEATURE_NETWORK, save_model
from cogview_pl.errors import UserError
from cogview_pl.evaluation.caption_network import CaptionNetwork, CaptionTraining, average_precision, share_found
from cogview_pl.evaluation.config import FeaturesConfig
from cogview_pl.evaluation.feature_folder import TrainedOn, load_network, save_caption_network, save_toy_network
from cogview_pl.evaluation.features import open_features
from cogview_pl.evaluation.style_network import ToyNetwork

SCORES = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.2, 0.1], [0.7, 0.3, 0.2]])
LABELS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
DATA = TrainedOn("cogview_pl.data.folder.FolderDataset", 1234, "f0")


def test_average_precision_by_hand() -> None:
    """The first term is at ranks 1 and 3 of 3, the second at rank 2, the third in no image."""
    first, second, third = average_precision(SCORES, LABELS).tolist()
    assert (first, second) == pytest.approx(((1 / 1 + 2 / 3) / 2, 1 / 2)) and math.isnan(third)


def test_share_found_by_hand() -> None:
    """Each image has one term; the best-scored one is right in the first and last image."""
    assert share_found(SCORES, LABELS) == pytest.approx(2 / 3)
    assert share_found(SCORES, torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 0, 0]])) == 1
    assert share_found(SCORES, torch.tensor([[0.0, 1, 1], [0, 0, 0], [0, 0, 0]])) == 0.5


def trained(seed: int = 0) -> tuple[CaptionNetwork, Tensor, Tensor]:
    """A network trained on images that are red, blue or both; their labels."""
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 2, (64, 2), generator=random).float()
    images = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    images[:, 0], images[:, 2] = (255 * labels.T[:, :, None, None]).byte()
    options = FeaturesConfig(epochs=1, lr=1e-2, hidden_size=4, num_features=8, blur=1.0, noise=0.05, tint=0.01)
    torch.manual_seed(seed)
    network = CaptionNetwork(options.hidden_size, options.num_features, num_terms=2)
    training = CaptionTraining(network, options, steps=16, seed=seed)
    for step in range(16):
        chosen = slice(step % 4 * 16, step % 4 * 16 + 16)
        training.step(images[chosen], labels[chosen])
    return network.eval(), images, labels


def test_it_learns_terms() -> None:
    network, images, labels = trained()
    with torch.no_grad():
        logits = network(images.float() / 255)[1]
    assert share_found(logits, labels) == 1
    assert average_precision(logits, labels).tolist() == pytest.approx([1, 1])


def test_equal_seeds_give_equal_networks() -> None:
    first, second, other = (trained(seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["terms.weight"], other["terms.weight"])


def test_folder_of_a_caption_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has features and no logits, because several terms belong to one image."""
    network, images, _ = trained()
    save_caption_network(network, tmp_path / "model", 16, DATA)
    with caplog.at_level(logging.INFO):
        opened = open_features(tmp_path, device="cpu", resolution=None, trust=False, verify=True)
    assert f"{tmp_path}, which learned from 1,234 captioned images ({DATA.data})" in caplog.text
    assert (opened.resolution, opened.num_features, opened.num_classes, opened.classes) == (16, 8, None, None)
    pixels = images.float() / 255
    found = opened(pixels)
    with torch.no_grad():
        torch.testing.assert_close(found.features, network(pixels)[0])
    assert found.logits is None


def test_folder_of_an_earlier_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = ToyNetwork(4, 3, 2).eval()
    sizes = {"hidden_size": 4, "num_features": 3}
    settings = {"resolution": 32, "classes": ["flat", "oil"], "toy_network": sizes}
    save_model(tmp_path / "old", network, FEATURE_NETWORK, settings)
    save_toy_network(network, tmp_path / "new", 32, ["flat", "oil"], DATA)
    with caplog.at_level(logging.INFO):
        old, new = (load_network(tmp_path / name, "key", verify=True) for name in ("old", "new"))
    assert "old, which learned from the toy world" in caplog.text
    assert "new, which learned from 1,234 images of the toy world" in caplog.text
    assert old[1:] == new[1:] == (32, ("flat", "oil"))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for part, expected in zip(old.network(image), network(image), strict=True):
            assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"resolution": 0}, "resolution is 0"),
        ({"caption_network": {"hidden_size": 4, "num_features": "3", "num_terms": 2}}, "num_features is '3'"),
        ({"caption_network": {"hidden_size": 4, "num_features": 3, "num_terms": 5}}, "terms"),
        ({"trained_on": {"data": "a\nb", "images": 1, "fingerprint": ""}}, "trained_on.data"),
        ({"trained_on": {"data": "a"}}, "no fingerprint"),
    ],
)
def test_damaged_settings(changed: dict[str, object], words: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 4, "num_features": 3, "num_terms": 2}
    settings = {"resolution": 32, "caption_network": sizes, "trained_on": {"data": "a", "images": 1, "fingerprint": ""}}
    save_model(tmp_path, CaptionNetwork(**sizes), FEATURE_NETWORK, settings | changed)
    with pytest.raises(UserError) as error:
        load_network(tmp_path, "evaluate.features", verify=True)
    assert words in str(error.value) and "\n" not in str(error.value)
