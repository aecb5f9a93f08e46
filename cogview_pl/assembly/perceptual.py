"""The network of the perceptual loss, from the files that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cogview_pl.errors import UserError
from cogview_pl.evaluation.convolutions import ConvolutionalNetwork
from cogview_pl.evaluation.feature_distance import FeatureDistance
from cogview_pl.evaluation.feature_folder import load_network
from cogview_pl.evaluation.lpips import LPIPS, SMALLEST
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.vqvae.config import PerceptualConfig, PerceptualNetwork
from cogview_pl.vqvae.perceptual import PerceptualLoss

KEY = "image_tokenizer.perceptual"


def check_perceptual(config: PerceptualConfig, edge: int) -> None:
    """Raises UserError for images that are too small, a file that is not given, or one that nothing reads."""
    if edge < SMALLEST:
        raise UserError(f"{KEY} needs images of {SMALLEST} pixels at least; raise image_tokenizer.image_size={edge}")
    if config.network == PerceptualNetwork.vgg and config.path is None:
        raise UserError(
            f"{KEY}.path is null: name the file of torchvision's weights of vgg16, such as vgg16-397923af.pth, or use "
            "image_tokenizer/perceptual=features"
        )
    if config.network == PerceptualNetwork.features and config.linear is not None:
        raise UserError(f"{KEY}.linear={config.linear} belongs to vgg16; set it to null")


def perceptual_loss(config: PerceptualConfig, outputs: str, *, verify: bool) -> PerceptualLoss:
    """The perceptual loss with the weights of its files.

    Args:
        config: options of the loss.
        outputs: folder of all runs, where the newest run of task=features is.
        verify: see `read_state_dict`.

    Raises:
        UserError: a file is missing, damaged or of another network; `layer_weights` has another number of layers.
    """
    if config.network == PerceptualNetwork.features:
        distance = _distance_of(_features(config, outputs, verify=verify))
        distance.weigh_channels_equally()
    else:
        distance = _vgg(config, verify=verify)
    if len(config.layer_weights) != len(distance.linear):
        raise UserError(
            f"{KEY}.layer_weights={config.layer_weights}: the network has {len(distance.linear)} compared layers; give "
            "a weight for each"
        )
    distance.weigh_layers(config.layer_weights)
    return PerceptualLoss(distance, weight=config.weight, smallest_edge=SMALLEST)


def empty_perceptual_loss(config: PerceptualConfig, outputs: str, *, verify: bool) -> Callable[[], PerceptualLoss]:
    """Makes a perceptual loss of the same size without the weights of its files, for an estimate of memory."""
    if config.network == PerceptualNetwork.vgg:
        return lambda: PerceptualLoss(LPIPS(), weight=config.weight, smallest_edge=SMALLEST)
    hidden_size = _channels(_features(config, outputs, verify=verify))[0]

    def build() -> PerceptualLoss:
        network = ConvolutionalNetwork(hidden_size, num_features=1)
        return PerceptualLoss(_distance_of(network), weight=config.weight, smallest_edge=SMALLEST)

    return build


def _vgg(config: PerceptualConfig, *, verify: bool) -> FeatureDistance:
    with torch.device("meta"):  # no random weights are made, because the files replace them
        model = LPIPS()
    model.load_network(Path(str(config.path)), f"{KEY}.path", verify=verify)
    if config.linear is not None:
        model.load_linear(Path(config.linear), f"{KEY}.linear", verify=verify)
    else:
        model.weigh_channels_equally()
    return model


def _features(config: PerceptualConfig, outputs: str, *, verify: bool) -> ConvolutionalNetwork:
    """The network of a run of task=features: the named one, else the newest."""
    key = f"{KEY}.path"
    return load_network(predecessor(outputs, "features", key, config.path), key, verify=verify).network


def _channels(network: ConvolutionalNetwork) -> list[int]:
    """Output channels of the convolutions."""
    return [layer.out_channels for layer in network.convolutions if isinstance(layer, nn.Conv2d)]


def _distance_of(network: ConvolutionalNetwork) -> FeatureDistance:
    """Compares the outputs of all ReLUs."""
    layers = network.convolutions
    relus = [number for number, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    taps = dict(zip(relus, _channels(network), strict=True))
    return FeatureDistance(layers, taps, mean=[0.0] * 3, deviation=[1.0] * 3)
