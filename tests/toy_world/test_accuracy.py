"""The toy world's own metrics, and the network that tells its styles apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogview_pl.evaluation.config import FeaturesConfig
from cogview_pl.evaluation.feature_folder import TrainedOn, save_toy_network
from cogview_pl.evaluation.features import open_features
from cogview_pl.evaluation.image_files import blur
from cogview_pl.evaluation.style_network import ATTRIBUTES, ToyNetwork, attributes_of, train_network
from cogview_pl.toy_world.accuracy import AttributeAccuracy, StyleAccuracy, asked_style, names_objects
from cogview_pl.toy_world.captions import STYLES

from .toy_images import toy_images

CLASSES = tuple(STYLES)


def drawings(split: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    data = toy_images(split, count, styles=CLASSES)
    images = torch.stack([data[i].image for i in range(count)])
    styles = torch.tensor([CLASSES.index(data.style(i)) for i in range(count)])
    return images, styles, torch.stack([attributes_of(data.scene(i)) for i in range(count)])


def trained(images: Tensor, styles: Tensor, attributes: Tensor, epochs: int, hidden_size: int) -> ToyNetwork:
    torch.manual_seed(0)
    network = ToyNetwork(hidden_size, 32, len(CLASSES))
    options = FeaturesConfig(
        epochs=epochs, lr=2e-3, hidden_size=hidden_size, num_features=32, blur=2.0, noise=0.05, tint=0.01
    )
    train_network(network, images, styles, attributes, options, batch_size=16, seed=0, on_step=lambda: None)
    return network


@pytest.mark.parametrize(
    ("prompt", "style"),
    [
        ("左上角有一个大的红色圆形", "flat"),
        ("左上角有一个大的红色圆形的油画图像", "oil"),
        ("中国画风格的一只猫", "ink"),
        ("Sketch of a cat", "sketch"),
        ("素描风格，不是油画", "sketch"),
        ("一只猫", None),
    ],
)
def test_style_that_a_prompt_asks_for(prompt: str, style: str | None) -> None:
    assert asked_style(prompt, "flat") == style
    assert names_objects(prompt) == ("圆形" in prompt)


def test_style_accuracy_passes_over_other_prompts() -> None:
    accuracy = StyleAccuracy(CLASSES, "flat")
    assert accuracy.compute() == {}
    logits = torch.eye(5)[[CLASSES.index(name) for name in ("oil", "flat", "ink")]]
    accuracy.add(logits, ["猫的油画图像", "中间有一个大的红色圆形，卡通风格", "一只猫"])
    assert accuracy.compute() == {"toy/style_accuracy": 0.5}


def test_attribute_accuracy_of_true_drawings_is_one() -> None:
    data = toy_images("val", 6)
    accuracy = AttributeAccuracy(64)
    accuracy.add(torch.stack([data[i].image for i in range(6)]), [*(data.text(i) for i in range(5)), "一只猫"])
    found = accuracy.compute()
    assert found["toy/colour_accuracy"] == found["toy/shape_accuracy"] == found["toy/all_right"] == 1
    assert found["toy/count"] == sum(len(data.scene(i).objects) for i in range(5))


def test_attributes_of_a_scene() -> None:
    scene = toy_images("train", 1).scene(0)
    named = {name for name, present in zip(ATTRIBUTES, attributes_of(scene).tolist(), strict=True) if present}
    assert named == {value for thing in scene.objects for value in thing.spec}


@pytest.mark.slow
def test_network_learns_the_styles_and_survives_its_folder(tmp_path: Path) -> None:
    network = trained(*drawings("train", 1200), epochs=4, hidden_size=8)
    save_toy_network(network, tmp_path / "model", 64, CLASSES, TrainedOn("toy", 1200, "0"))
    opened = open_features(tmp_path, device="cpu", resolution=None, trust=False, verify=True)
    assert opened.classes == CLASSES and opened.num_features == 32
    images, styles, _ = drawings("val", 200)
    exact = images.float() / 255
    with torch.no_grad():
        torch.testing.assert_close(opened(exact).features, network(exact)[0])
    for shown in (exact, blur(exact, 1.0)):  # reconstructions are softer than drawings
        logits = opened(shown).logits
        assert logits is not None
        assert (logits.argmax(1) == styles).float().mean() >= 0.99


def test_equal_seeds_give_equal_networks() -> None:
    data = drawings("train", 64)
    first, second = (trained(*data, epochs=1, hidden_size=4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
