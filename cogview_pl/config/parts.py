"""Options of builders that need several groups of the configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from cogview_pl.assembly.options import GenerationOptions, ModelOptions, TrainingOptions
from cogview_pl.config.schema import Config

_Options = TypeVar("_Options", ModelOptions, TrainingOptions, GenerationOptions)


def model_options(config: Config) -> ModelOptions:
    """Options that open and build models."""
    return _options(ModelOptions, config, transformer=config.model)


def training_options(config: Config) -> TrainingOptions:
    """Options of a trainer."""
    starts_from_weights = config.init_from is not None or config.starts_from is not None
    return _options(TrainingOptions, config, starts_from_weights=starts_from_weights)


def generation_options(config: Config) -> GenerationOptions:
    """Options that open the models of `task=generate` and sample from them."""
    return _options(GenerationOptions, config, models=model_options(config), resume=bool(config.resume))


def _options(kind: type[_Options], config: Config, **derived: Any) -> _Options:
    """Options with the keys of the configuration that have the names of its fields, and with derived values."""
    names = [item.name for item in fields(kind) if item.name not in derived]
    return kind(**{name: getattr(config, name) for name in names}, **derived)
