"""Schemas of our own config groups: a misspelt key or a wrong type dies when the config is composed.

`conf/` holds the values and says what each knob does; this file holds names and types. Third-party objects
(optimizer, callbacks, loggers) are plain `_target_` nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate as instantiate
from omegaconf import MISSING


class Verb(Enum):
    """What a task does; each is a file in `cogview_pl/tasks/`."""

    fit_image_tokenizer = "fit_image_tokenizer"
    fit_sequence_model = "fit_sequence_model"
    tokenize = "tokenize"
    generate = "generate"
    chain = "chain"


class Norm(Enum):
    """Placement of LayerNorm."""

    pre = "pre"
    post = "post"
    sandwich = "sandwich"


class NormScope(Enum):
    """Scope of the PB-Relax maximum in LayerNorm."""

    none = "none"
    token = "token"
    tensor = "tensor"


class AttentionForm(Enum):
    """How attention is computed."""

    fused = "fused"
    pb_relax = "pb_relax"
    naive = "naive"


class Reconstruction(Enum):
    """Distance between a picture and its reconstruction."""

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
    image_size: int = MISSING
    downsampling: int = MISSING
    grid: int = MISSING
    width: int = MISSING
    residual_blocks: int = MISSING
    code_dim: int = MISSING
    num_codes: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    reconstruction: Reconstruction = MISSING
    reconstruction_weight: float = MISSING
    continuous_steps: int = MISSING
    quantizer: QuantizerConfig = MISSING


@dataclass
class ModelConfig:
    """Stage 2: the transformer."""

    num_layers: int = MISSING
    width: int = MISSING
    num_heads: int = MISSING
    num_positions: int = MISSING
    norm: Norm = MISSING
    norm_scope: NormScope = MISSING
    attention: AttentionForm = MISSING
    dropout: float = MISSING
    init_std: float = MISSING


@dataclass
class TextConfig:
    """The text tokenizer."""

    model: str | None = None
    num_pieces: int = MISSING
    model_type: str = MISSING
    character_coverage: float = MISSING
    max_length: int = MISSING


@dataclass
class TemplateConfig:
    """The layout of a sequence."""

    layout: str = MISSING
    target: str = MISSING
    loss: dict[str, float] = MISSING
    restart_positions_at: str | None = None


@dataclass
class DataConfig:
    """What every data source has; the variants extend it."""

    kind: str = MISSING
    image_size: int = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING
    max_skipped_share: float = MISSING
    store: str | None = None


@dataclass
class ToyDataConfig(DataConfig):
    """Coloured shapes, drawn on the fly."""

    train_size: int = MISSING
    val_size: int = MISSING
    seed: int = MISSING
    language: str = MISSING
    styles: list[str] = MISSING
    style_in_caption: bool = MISSING
    object_probabilities: list[float] = MISSING


@dataclass
class FolderDataConfig(DataConfig):
    """A folder of pictures with captions."""

    root: str = MISSING
    val_fraction: float = MISSING
    caption_field: str | None = None


@dataclass
class WebDatasetConfig(DataConfig):
    """Tar shards."""

    urls: Any = MISSING
    val_urls: Any = None
    val_fraction: float = MISSING
    caption_field: str = MISSING


@dataclass
class SamplerConfig:
    """How tokens are drawn in generation."""

    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    batch_size: int = MISSING


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    optimizer: dict[str, Any] = MISSING
    weight_decay: float = MISSING
    warmup: float = MISSING
    final_lr: float = MISSING
    gradient_clip: float = MISSING


@dataclass
class Config:
    """The whole configuration of a run."""

    task: str = MISSING
    verb: Verb = MISSING
    seed: int = MISSING
    outputs: str = MISSING
    run_dir: str | None = None
    init_from: str | None = None
    resume: Any = None
    prompts: Any = None
    num_prompts: int = MISSING
    num_images: int = MISSING
    plan: bool = False
    threads: int | None = None
    font: str | None = None

    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: dict[str, Any] = field(default_factory=dict)
    strategy: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    common: list[str] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)


def register_schemas() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, quantizer in _QUANTIZERS.items():
        store.store(group="schema/quantizer", name=name, node=quantizer)
    for name, data in _DATA.items():
        store.store(group="schema/data", name=name, node=data)


_QUANTIZERS = {
    "ema": EMAQuantizerConfig,
    "learned": LearnedQuantizerConfig,
    "gumbel": GumbelQuantizerConfig,
    "fixed": FixedQuantizerConfig,
}
_DATA = {"toy": ToyDataConfig, "folder": FolderDataConfig, "webdataset": WebDatasetConfig}
