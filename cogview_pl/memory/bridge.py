"""Temporary: old signatures."""

from __future__ import annotations

from typing import Any

from cogview_pl.assembly import checks, model_specs, models, pipelines, prompts, strategy, trainer
from cogview_pl.assembly.model_specs import ImageTokenizerSpec as ImageSizes
from cogview_pl.assembly.model_specs import SequenceModelSpec as SequenceSizes
from cogview_pl.assembly.roles import Role
from cogview_pl.config.parts import model_options, training_options


def configured_images(c: Any) -> ImageSizes:
    return model_specs.configured_images(model_options(c))


def images_of_run(c: Any) -> ImageSizes:
    return model_specs.existing_images(model_options(c))


def starts_from_weights(c: Any) -> bool:
    return training_options(c).starts_from_weights


def trained_sizes(c: Any) -> SequenceSizes:
    start = (c.starts_from or "pretrain", c.init_from) if starts_from_weights(c) else None
    return model_specs.training_spec(
        model_options(c), c.template, source=c.sequences.source, token_store=c.data.token_store, start=start
    )


def written_sizes(c: Any, task: str, key: str, given: Any, layout: Any) -> SequenceSizes:
    return model_specs.role_spec(Role(key, task, lambda t: None), model_options(c), given, layout)


def quantization(c: Any) -> Any:
    return c.quantization and c.quantization.value


def weights_dtype(c: Any) -> Any:
    return models.weights_dtype(c.precision)


def tensor_parts(c: Any) -> int:
    return strategy.tensor_parts(c.strategy, c.trainer)


def num_devices(c: Any) -> int:
    return strategy.num_devices(c.trainer)


def predicted_ids(c: Any, template: Any) -> Any:
    return model_specs.predicted_ids(c.compat, template)


def lora_options(c: Any) -> Any:
    if not c.lora.rank:
        return {}
    return {"rank": c.lora.rank, "alpha": c.lora.alpha, "targets": c.lora.targets, "held": weights_dtype(c)}


def without_fused_kernel(c: Any) -> Any:
    return trainer.optimizer_node(training_options(c))


def check_levers(c: Any) -> None:
    checks._check_optimizer(training_options(c))


def check_strategy(c: Any, spreads: bool) -> None:
    checks._check_strategy(training_options(c), shardable=spreads)


def sampling(c: Any) -> Any:
    return pipelines.sampling_of(c.sampler)


def read_prompts(c: Any) -> list[str]:
    return prompts.prompts_or_captions(c.prompts, c.data, c.num_prompts)
