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
from omegaconf import OmegaConf

from cogview_pl.config.choices import Verb
from cogview_pl.data.config import DataConfig, FolderDataConfig, SequencesConfig, TokenStoreConfig, WebDatasetConfig
from cogview_pl.errors import UserError
from cogview_pl.evaluation.config import EvaluateConfig, FeaturesConfig
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.limits import MISSING, count, seed_number
from cogview_pl.lit.config import OptimizerConfig, StrategyConfig
from cogview_pl.memory.config import PlanConfig
from cogview_pl.toy_world.config import ToyDataConfig
from cogview_pl.transformer.config import ActivationCheckpointing, LoRAConfig, TransformerConfig
from cogview_pl.vocab.config import CompatConfig, TemplateConfig, TextConfig
from cogview_pl.vqvae.config import (
    EMAQuantizerConfig,
    FixedQuantizerConfig,
    GumbelQuantizerConfig,
    ImageTokenizerConfig,
    LearnedQuantizerConfig,
)


@dataclass
class ConvertConfig:
    """What task=convert reads and writes."""

    source: str = MISSING
    target: str = MISSING


@dataclass
class Config:
    """The whole configuration of a run."""

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
    data: DataConfig = field(default_factory=DataConfig)
    token_store: TokenStoreConfig = field(default_factory=TokenStoreConfig)
    sequences: SequencesConfig = field(default_factory=SequencesConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampler: Sampling = field(default_factory=Sampling)
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
