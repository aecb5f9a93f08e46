"""Schemas of our own config groups: a misspelt key or a wrong type dies when the config is composed.

`conf/` holds the values and says what each knob does; this file holds names and types (`choices.py` those of keys with
a few named values). Third-party objects (optimizer, callbacks, loggers) are plain `_target_` nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hydra.utils
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf

from cogview_pl.config.choices import (
    ActivationCheckpointing,
    Algorithm,
    AttentionForm,
    LoRATarget,
    Norm,
    NormScope,
    Quantization,
    Reconstruction,
    StoreFormat,
    StrategyKind,
    TokenSource,
    Verb,
)
from cogview_pl.errors import UserError


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
    codebook_dim: int = MISSING
    codebook_size: int = MISSING
    mean: list[float] = MISSING
    std: list[float] = MISSING
    reconstruction: Reconstruction = MISSING
    reconstruction_weight: float = MISSING
    quantize_after_steps: int = MISSING
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
    vocab_size: int = MISSING
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
class CompatConfig:
    """Quirks of the original program."""

    restart_after_token: bool = MISSING
    loss_by_input: bool = MISSING
    loss_over_vocabulary: bool = MISSING
    end_of_text: str = MISSING


@dataclass
class ConvertConfig:
    """What task=convert reads and writes."""

    source: str = MISSING
    target: str = MISSING


@dataclass
class DataConfig:
    """What every data source has; the variants extend it."""

    kind: str = MISSING
    image_size: int = MISSING
    batch_size: int = MISSING
    num_workers: int = MISSING
    worker_timeout: float | None = MISSING
    max_skipped_share: float = MISSING
    val_fraction: float = MISSING
    min_size: int = 0
    style_patterns: list[str] = MISSING
    store: str | None = None


@dataclass
class ToyDataConfig(DataConfig):
    """Coloured shapes, drawn on the fly."""

    train_size: int = MISSING
    val_size: int = MISSING
    seed: int = MISSING
    language: str = MISSING
    styles: list[str] = MISSING
    object_probabilities: list[float] = MISSING


@dataclass
class FolderDataConfig(DataConfig):
    """A folder of images with captions."""

    root: str | None = None
    caption_field: str | None = None
    styles: Any = None
    style_field: str | None = None


@dataclass
class WebDatasetConfig(DataConfig):
    """Tar shards."""

    urls: Any = MISSING
    val_urls: Any = None
    caption_field: str = MISSING
    style_field: str | None = None
    styles: list[str] | None = None


@dataclass
class StoreConfig:
    """The token store that task=tokenize writes."""

    format: StoreFormat = MISSING
    large: bool = MISSING


@dataclass
class SequencesConfig:
    """What stage 2 trains on."""

    source: TokenSource = MISSING
    replay_store: str | None = None
    replay_share: float = MISSING
    conditioning_dropout: float = MISSING
    token_noise: float = MISSING


@dataclass
class SamplerConfig:
    """How tokens are drawn in generation."""

    temperature: float = MISSING
    top_k: int = MISSING
    top_p: float = MISSING
    guidance: float = MISSING
    algorithm: Algorithm = MISSING
    drafts: int = MISSING
    cuda_graphs: bool = MISSING
    batch_size: int = MISSING


@dataclass
class LoRAConfig:
    """Small trained matrices beside frozen weights."""

    rank: int = MISSING
    alpha: float = MISSING
    targets: list[LoRATarget] = MISSING
    merge: bool = MISSING


@dataclass
class FeaturesConfig:
    """How task=features trains its network."""

    epochs: int = MISSING
    lr: float = MISSING
    width: int = MISSING
    num_features: int = MISSING
    blur: float = MISSING
    noise: float = MISSING
    tint: float = MISSING


@dataclass
class EvaluateConfig:
    """What task=evaluate measures, and with what."""

    metrics: list[str] = MISSING
    features: str | None = None
    trust_features: bool = MISSING
    resolution: int | None = None
    lpips: list[str] | None = None
    reference: str | None = None
    blur: list[float] = MISSING
    is_splits: int = MISSING
    base_style: str = MISSING
    compare: list[str] | None = None


@dataclass
class OptimizerConfig:
    """Optimizer, learning-rate schedule and gradient clipping."""

    optimizer: dict[str, Any] = MISSING
    weight_decay: float = MISSING
    warmup: float = MISSING
    final_lr: float = MISSING
    gradient_clip: float = MISSING


@dataclass
class PlanConfig:
    """The estimate of memory: `plan=true` for nothing else, else before every fit and generate."""

    only: bool = MISSING
    strict: bool = MISSING
    bench: str = MISSING


@dataclass
class StrategyConfig:
    """Devices: which kind of strategy, and the object or name that Lightning is given."""

    kind: StrategyKind = MISSING
    strategy: Any = MISSING


@dataclass
class Config:
    """The whole configuration of a run."""

    task: str = MISSING
    verb: Verb = MISSING
    seed: int = MISSING
    outputs: str = MISSING
    run_dir: str | None = None
    init_from: str | None = None
    starts_from: str | None = None
    rerank_with: str | None = None
    upscale_with: str | None = None
    resume: Any = None
    prompts: Any = None
    images: Any = None
    pairs: str | None = None
    num_prompts: int = MISSING
    num_images_per_prompt: int = MISSING
    num_captions: int = MISSING
    keep: int | None = None
    weights: Quantization | None = None
    threads: int | None = None
    compile: bool = False
    activation_checkpointing: ActivationCheckpointing = MISSING
    font: str | None = None
    verify: bool = MISSING

    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    rerank_template: TemplateConfig = field(default_factory=TemplateConfig)
    upscale_template: TemplateConfig = field(default_factory=TemplateConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
    convert: ConvertConfig | None = None
    features: FeaturesConfig | None = None
    evaluate: EvaluateConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    precision: dict[str, Any] = field(default_factory=dict)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    common: list[str] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)


def instantiate(node: dict[str, Any], key: str) -> Any:
    """The object that a `_target_` node describes; raises UserError naming its `key` if it cannot be made."""
    try:
        return hydra.utils.instantiate(node)
    except HydraException as error:
        reason = str(error).replace(", set env var HYDRA_FULL_ERROR=1 to see chained exception.", ";").strip()
        raise UserError(f"{key}: {reason}") from error


def register_schemas() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, quantizer in _QUANTIZERS.items():
        store.store(group="schema/quantizer", name=name, node=quantizer)
    for name, data in _DATA.items():
        store.store(group="schema/data", name=name, node=data)


# For the files in `conf/`. On import, since to a job elsewhere a launcher sends the schemas along, but not these.
OmegaConf.register_new_resolver("half", lambda number: number // 2, replace=True)  # rounded down
OmegaConf.register_new_resolver("equal", lambda one, other: one == other, replace=True)

_QUANTIZERS = {
    "ema": EMAQuantizerConfig,
    "learned": LearnedQuantizerConfig,
    "gumbel": GumbelQuantizerConfig,
    "fixed": FixedQuantizerConfig,
}
_DATA = {"toy": ToyDataConfig, "folder": FolderDataConfig, "webdataset": WebDatasetConfig}
