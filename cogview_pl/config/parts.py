"""The parts of a configuration that builders take where one group is not enough."""

from __future__ import annotations

from cogview_pl.assembly.options import GenerationOptions, ModelOptions, TrainingOptions
from cogview_pl.config.schema import Config


def model_options(config: Config) -> ModelOptions:
    """What opens and builds models."""
    return ModelOptions(
        outputs=config.outputs,
        verify=config.verify,
        image_tokenizer=config.image_tokenizer,
        text=config.text,
        transformer=config.model,
        compat=config.compat,
    )


def training_options(config: Config) -> TrainingOptions:
    """What builds a trainer."""
    return TrainingOptions(
        task=config.task,
        seed=config.seed,
        resume=config.resume,
        verify=config.verify,
        compile=config.compile,
        precision=config.precision,
        strategy=config.strategy,
        optimizer=config.optimizer,
        trainer=config.trainer,
        callbacks=config.callbacks,
        logger=config.logger,
        lora=config.lora,
        starts_from_weights=config.init_from is not None or config.starts_from is not None,
    )


def generation_options(config: Config) -> GenerationOptions:
    """What opens the models of `task=generate` and samples from them."""
    return GenerationOptions(
        task=config.task,
        models=model_options(config),
        init_from=config.init_from,
        rerank_with=config.rerank_with,
        upscale_with=config.upscale_with,
        template=config.template,
        rerank_template=config.rerank_template,
        upscale_template=config.upscale_template,
        sampler=config.sampler,
        precision=config.precision,
        quantization=config.quantization,
        strategy=config.strategy,
        trainer=config.trainer,
        num_images_per_prompt=config.num_images_per_prompt,
        top_n=config.top_n,
        seed=config.seed,
        resume=bool(config.resume),
        font=config.font,
    )
