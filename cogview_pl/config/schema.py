"""The schema of the configuration: an unknown key or a wrong type is refused when Hydra composes it.

`conf/` has values and comments. Dataclasses of the packages have names, types and ranges. Objects of third parties
(optimizer, callbacks, loggers) are plain `_target_` nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from cogview_pl.config.choices import Verb
from cogview_pl.data.config import (
    DataConfig,
    FolderDataConfig,
    HuggingFaceConfig,
    ParquetConfig,
    SequencesConfig,
    TokenStoreConfig,
    WebDatasetConfig,
)
from cogview_pl.evaluation.config import EvaluateConfig, FeaturesConfig
from cogview_pl.generation.config import CompletionConfig, Quantization, Sampling
from cogview_pl.kernels.config import CPUKernels
from cogview_pl.limits import MISSING, count, seed_number
from cogview_pl.lit.config import ModelFrom, OptimizerConfig, StrategyConfig
from cogview_pl.memory.config import PlanConfig
from cogview_pl.runs.aims import Aim
from cogview_pl.toy_world.config import ToyDataConfig
from cogview_pl.transformer.config import ActivationCheckpointing, LoRAConfig, TransformerConfig
from cogview_pl.vocab.config import CompatConfig, TemplateConfig, TextConfig
from cogview_pl.vqvae.config import (
    CosineQuantizerConfig,
    EMAQuantizerConfig,
    FixedQuantizerConfig,
    FSQQuantizerConfig,
    GumbelQuantizerConfig,
    ImageTokenizerConfig,
    LearnedQuantizerConfig,
)

if TYPE_CHECKING:
    DataNode = DataConfig
else:  # for OmegaConf, because a user's own data set has keys that no dataclass defines
    DataNode = Any


@dataclass
class ConvertConfig:
    """Paths of task=convert."""

    source: str = MISSING
    target: str = MISSING


@dataclass
class SweepConfig:
    """Columns of the table of a sweep."""

    metrics: list[str] | None = None


@dataclass
class Config:
    """The configuration of a run."""

    task: str = MISSING
    verb: Verb = MISSING
    seed: int = seed_number()
    outputs: str = MISSING
    run_dir: str | None = None
    init_from: str | None = None
    starts_from: str | None = None
    rerank_with: str | None = None
    upscale_with: str | None = None
    resume: Any = None
    model_from: ModelFrom = MISSING
    objective: str | None = None
    sweep: SweepConfig = field(default_factory=SweepConfig)
    prompts: Any = None
    images: Any = None
    pairs: str | None = None
    num_prompts: int = count()
    num_images_per_prompt: int = count()
    num_captions: int = count()
    top_n: int | None = count(None)
    quantization: Quantization | None = None
    threads: int | None = count(None)
    compile: bool = False
    cpu_kernels: CPUKernels = MISSING
    activation_checkpointing: ActivationCheckpointing = MISSING
    font: str | None = None
    verify: bool = MISSING

    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    rerank_template: TemplateConfig = field(default_factory=TemplateConfig)
    upscale_template: TemplateConfig = field(default_factory=TemplateConfig)
    compat: CompatConfig = field(default_factory=CompatConfig)
    convert: ConvertConfig | None = None
    features: FeaturesConfig | None = None
    evaluate: EvaluateConfig | None = None
    data: DataNode = MISSING
    token_store: TokenStoreConfig = field(default_factory=TokenStoreConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampler: Sampling = field(default_factory=Sampling)
    complete: CompletionConfig = field(default_factory=CompletionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    precision: dict[str, Any] = field(default_factory=dict)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)
    common: list[str] = field(default_factory=list)
    stages: dict[str, list[str]] = field(default_factory=dict)
    side_by_side: list[list[str]] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.data, dict):
            self.data = DataConfig.of_any_class(self.data)


@cache
def register_schemas() -> None:
    """Register the schemas with Hydra: `schema`, and one per built-in quantizer and data set.

    They belong to no group, since `--help` lists groups as choices of the user.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name, options in (_QUANTIZERS | _DATA).items():
        store.store(name=f"schema_{name}", node=options)


def _grid(divisor: int, *, _root_: DictConfig) -> str:
    """Number of codes along both edges of an image, such as `8x8`, after its edges are divided by `divisor`."""
    images = _root_.image_tokenizer
    edge = images.image_size // max(images.downsampling, 1) // divisor  # downsampling below 1 is refused later
    return f"{edge}x{edge}"


# Resolvers for `conf/`, and `mapping` for the command line. They are registered on import, because a launcher of remote
# jobs sends schemas to a job but no resolvers.
OmegaConf.register_new_resolver("grid", _grid, replace=True)
OmegaConf.register_new_resolver("mapping", lambda *parts: dict(zip(parts[::2], parts[1::2], strict=True)), replace=True)
OmegaConf.register_new_resolver("folder_name", lambda path: Path(str(path)).name, replace=True)
OmegaConf.register_new_resolver("equal", lambda one, other: one == other, replace=True)

_QUANTIZERS = {
    "ema": EMAQuantizerConfig,
    "learned": LearnedQuantizerConfig,
    "gumbel": GumbelQuantizerConfig,
    "fixed": FixedQuantizerConfig,
    "cosine": CosineQuantizerConfig,
    "fsq": FSQQuantizerConfig,
}
_DATA = {
    "toy": ToyDataConfig,
    "folder": FolderDataConfig,
    "webdataset": WebDatasetConfig,
    "parquet": ParquetConfig,
    "hf": HuggingFaceConfig,
}
