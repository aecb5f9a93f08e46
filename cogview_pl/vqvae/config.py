"""Options of the image tokenizer, its quantizers and its losses: the schema of `conf/image_tokenizer`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cogview_pl.errors import UserError
from cogview_pl.limits import MISSING, above_0, at_least_0, count, share, share_below_1, whole

BUILT_IN = "cogview_pl.vqvae.quantizer"
"""Module of the built-in quantizers, except those of few dimensions."""
PROJECTED = "cogview_pl.vqvae.projected_quantizers"
"""Module of the quantizers of few dimensions."""
EXTERNAL_KEY = "image_tokenizer.external"
"""Config key of an image tokenizer of another project."""
QUANTIZERS = "ema, learned, gumbel, fixed, cosine or fsq"
"""Choices of the group `image_tokenizer/quantizer`, for messages."""


class Reconstruction(Enum):
    """Distance between an image and its reconstruction: mean absolute (`l1`) or squared (`l2`) error."""

    l1 = "l1"
    l2 = "l2"


class TrainedPart(Enum):
    """What a run trains: the whole tokenizer, or its decoder alone, so that all images keep their codes."""

    all = "all"
    decoder = "decoder"


@dataclass
class QuantizerConfig:
    """The quantizer's class; subclasses add its arguments."""

    _target_: str = MISSING


@dataclass
class UpkeptQuantizerConfig(QuantizerConfig):
    """Upkeep of a codebook: k-means start and revival of dead codes."""

    decay: float = MISSING
    kmeans_iters: int = MISSING
    dead_threshold: float = MISSING
    revive_every: int = MISSING


@dataclass
class EMAQuantizerConfig(UpkeptQuantizerConfig):
    """Nearest neighbour, codebook as a moving average."""

    commitment_weight: float = MISSING


@dataclass
class LearnedQuantizerConfig(UpkeptQuantizerConfig):
    """Nearest neighbour, codebook by gradient."""

    commitment_weight: float = MISSING


@dataclass
class FixedQuantizerConfig(QuantizerConfig):
    """Nearest neighbour in a random codebook that stays."""

    commitment_weight: float = MISSING


@dataclass
class GumbelQuantizerConfig(UpkeptQuantizerConfig):
    """Gumbel softmax over the codebook."""

    hard: bool = MISSING
    temperature_start: float = MISSING
    temperature_end: float = MISSING
    kl_weight: float = MISSING
    scale_distances: bool = MISSING
    commitment_weight: float = MISSING


@dataclass
class CosineQuantizerConfig(EMAQuantizerConfig):
    """Codes of few dimensions on the unit sphere."""

    projected_dim: int = MISSING


@dataclass
class FSQQuantizerConfig(QuantizerConfig):
    """Finite scalar quantization."""

    levels: list[int] = MISSING


class DiscriminatorNorm(Enum):
    """Norm of the discriminator's feature maps. Both work on each image alone, so the batch does not matter."""

    group = "group"
    none = "none"


class Regularisation(Enum):
    """Regularisation of the discriminator.

    `lecam`: logits stay near moving averages (Tseng et al. 2021). `r1`: the gradient at real images stays small
    (Mescheder et al. 2018).
    """

    none = "none"
    lecam = "lecam"
    r1 = "r1"


@dataclass
class AdversarialConfig:
    """The adversarial loss, its discriminator and the discriminator's optimizer."""

    start: int = whole()
    weight: float = at_least_0()
    adaptive: bool = MISSING
    largest_adaptive_weight: float = above_0()
    hidden_size: int = count()
    layers: int = count()
    norm: DiscriminatorNorm = MISSING
    regularisation: Regularisation = MISSING
    regularisation_weight: float = at_least_0()
    lecam_decay: float = share_below_1()
    lr: float = above_0()
    betas: list[float] | None = share_below_1(None)


class PerceptualNetwork(Enum):
    """Network of the perceptual loss: VGG-16 from a file, or the network of a run of `task=features`."""

    vgg = "vgg"
    features = "features"


@dataclass
class PerceptualConfig:
    """The perceptual loss and the files of its network."""

    network: PerceptualNetwork = MISSING
    path: str | None = None
    linear: str | None = None
    weight: float = above_0()
    layer_weights: list[float] = at_least_0()


@dataclass
class VQVAEConfig:
    """The VQ-VAE."""

    downsampling: int = count()
    hidden_size: int = count()
    residual_blocks: int = whole()
    codebook_dim: int = count()
    codebook_size: int = count()
    mean: list[float] = MISSING
    std: list[float] = above_0()
    quantizer: Any = MISSING
    """A `QuantizerConfig`, or a dictionary with `_target_` and the arguments of the user's own quantizer."""


@dataclass
class ImageTokenizerConfig(VQVAEConfig):
    """Stage 1: the VQ-VAE, its images and its losses."""

    path: str | None = None
    external: Any = None
    """None, or a dictionary with `_target_` and the arguments of an image tokenizer of another project."""
    image_size: int = count()
    reconstruction: Reconstruction = MISSING
    reconstruction_weight: float = above_0()
    adversarial: AdversarialConfig | None = None
    perceptual: PerceptualConfig | None = None
    trained_part: TrainedPart = MISSING
    quantize_after_steps: int | None = whole()
    min_codebook_share: float = share()


def import_quantizer(quantizer: Any) -> None:
    """Import the module of the quantizer that a user's configuration names.

    Model folders import nothing: they may only name classes that are imported already (`vqvae.quantizer_registry`).

    Args:
        quantizer: the node `image_tokenizer.quantizer`.

    Raises:
        UserError: the node is no quantizer, or its module cannot be imported.
    """
    target = getattr(quantizer, "_target_", None)
    if not isinstance(target, str) or "." not in target:
        raise UserError(
            f"image_tokenizer.quantizer={quantizer if target is None else target} names no class; choose "
            f"image_tokenizer/quantizer={QUANTIZERS}, or give your class in _target_ (module.Class)"
        )
    module = target.rpartition(".")[0]
    if module in (BUILT_IN, PROJECTED):
        return  # without torch, so that errors come fast
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"image_tokenizer.quantizer._target_={target}: {error}; give module.Class of a file in the working folder "
            "or of an installed package"
        ) from error


def import_external(external: Any) -> None:
    """Import the class of the external tokenizer that a user's configuration names (`image_tokenizer.external`).

    Raises:
        UserError: the node names no class, or the class cannot be imported.
    """
    if external is None:
        return
    target = getattr(external, "_target_", None)
    if not isinstance(target, str) or "." not in target:
        raise UserError(
            f"{EXTERNAL_KEY}={external if target is None else target} names no class; give _target_=module.Class"
        )
    from cogview_pl.vqvae.external import trust_external  # here, because it imports torch

    trust_external(target)
