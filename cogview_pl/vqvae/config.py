"""Options of the image tokenizer and its quantizers: the schema of `conf/image_tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from cogview_pl.limits import MISSING, at_least_0, count


class Reconstruction(Enum):
    """Distance between a image and its reconstruction."""

    l1 = "l1"
    l2 = "l2"


@dataclass
class QuantizerConfig:
    """Arguments that every quantizer has; the variants extend it."""

    kind: str = MISSING


@dataclass
class EMAQuantizerConfig(QuantizerConfig):
    """Nearest neighbour, codebook as a moving average."""

    commitment_weight: float = MISSING
    decay: float = MISSING
    kmeans_iters: int = MISSING
    dead_threshold: float = MISSING
    revive_every: int = MISSING


@dataclass
class LearnedQuantizerConfig(QuantizerConfig):
    """Nearest neighbour, codebook by gradient."""

    commitment_weight: float = MISSING


@dataclass
class GumbelQuantizerConfig(QuantizerConfig):
    """Gumbel softmax over the codebook."""

    hard: bool = MISSING
    temperature_start: float = MISSING
    temperature_end: float = MISSING
    kl_weight: float = MISSING


@dataclass
class FixedQuantizerConfig(QuantizerConfig):
    """Random codebook that never changes."""

    commitment_weight: float = MISSING


@dataclass
class ImageTokenizerConfig:
    """Stage 1: the VQ-VAE and its loss."""

    path: str | None = None
    image_size: int = count()
    downsampling: int = MISSING
    grid: int = count()
    hidden_size: int = count()
    residual_blocks: int = at_least_0()
    codebook_dim: int = count()
    codebook_size: int = count()
    mean: list[float] = MISSING
    std: list[float] = MISSING
    reconstruction: Reconstruction = MISSING
    reconstruction_weight: float = MISSING
    quantize_after_steps: int = at_least_0()
    quantizer: QuantizerConfig = MISSING
