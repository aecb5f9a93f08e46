"""Options of builders that need several groups of the configuration. Fields have the names of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cogview_pl.data.config import SequencesConfig
from cogview_pl.generation.config import CompletionConfig, Quantization, Sampling
from cogview_pl.lit.config import ModelFrom, OptimizerConfig, StrategyConfig
from cogview_pl.transformer.config import LoRAConfig, TransformerConfig
from cogview_pl.vocab.config import CompatConfig, TemplateConfig, TextConfig
from cogview_pl.vqvae.config import ImageTokenizerConfig


@dataclass(frozen=True)
class ModelOptions:
    """Options that open and build models.

    Attributes:
        outputs: folder of the runs of all tasks.
        verify: whether files are compared with their checksums.
        image_tokenizer, text, transformer, compat: groups of the configuration; `transformer` is `model`.
    """

    outputs: str
    verify: bool
    image_tokenizer: ImageTokenizerConfig
    text: TextConfig
    transformer: TransformerConfig
    compat: CompatConfig

    def layout(self, template: TemplateConfig) -> dict[str, Any]:
        """Constructor arguments of `Template`, as plain values."""
        return {
            **asdict(template),
            "text_length": self.text.max_length,
            "restart_after_token": self.compat.restart_after_token,
            "loss_by_input": self.compat.loss_by_input,
        }


@dataclass(frozen=True)
class TrainingOptions:
    """Options that both stages share in training."""

    task: str
    seed: int
    resume: Any
    model_from: ModelFrom
    verify: bool
    compile: bool
    precision: Mapping[str, Any]
    strategy: StrategyConfig
    optimizer: OptimizerConfig
    trainer: Mapping[str, Any]
    callbacks: Mapping[str, Any]
    logger: Mapping[str, Any]
    lora: LoRAConfig
    starts_from_weights: bool
    """Whether training starts from the weights of a model, not from random weights."""


def sequence_settings(template: TemplateConfig, sequences: SequencesConfig) -> dict[str, Any]:
    """Values of training sequences that must not change while a run is stopped."""
    return {
        "template.layout": template.layout,
        "template.loss": dict(template.loss),
        "sequences.replay_share": sequences.replay_share,
        "sequences.conditioning_dropout": sequences.conditioning_dropout,
        "sequences.token_noise": sequences.token_noise,
    }


@dataclass(frozen=True)
class GenerationOptions:
    """Options that generate images."""

    task: str
    models: ModelOptions
    init_from: str | None
    rerank_with: str | None
    upscale_with: str | None
    template: TemplateConfig
    rerank_template: TemplateConfig
    upscale_template: TemplateConfig
    sampler: Sampling
    complete: CompletionConfig
    precision: Mapping[str, Any]
    quantization: Quantization | None
    strategy: StrategyConfig
    trainer: Mapping[str, Any]
    num_images_per_prompt: int
    top_n: int | None
    seed: int
    resume: bool
    font: str | None

    @property
    def kept(self) -> int:
        """Number of images kept per prompt."""
        return min(self.top_n or self.num_images_per_prompt, self.num_images_per_prompt)
