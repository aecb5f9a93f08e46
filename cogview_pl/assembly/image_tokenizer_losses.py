"""Losses of the image tokenizer: checks of their options, and the discriminator."""

from __future__ import annotations

from typing import Any

import torch

from cogview_pl.assembly.options import TrainingOptions
from cogview_pl.assembly.perceptual import check_perceptual
from cogview_pl.checkpoints.settings import plain
from cogview_pl.errors import UserError
from cogview_pl.lit.optimizers import BuildOptimizer
from cogview_pl.vqvae.adversarial import AdversarialLoss
from cogview_pl.vqvae.config import AdversarialConfig, ImageTokenizerConfig, TrainedPart
from cogview_pl.vqvae.discriminator import smallest_edge

USUAL_CONTINUOUS_STEPS = 100
"""First steps without quantization where `image_tokenizer.quantize_after_steps` is null."""
_CONTINUOUS_PART = 4  # they are at most this part of all steps
_ADVERSARIAL = "image_tokenizer.adversarial"
_OF_THE_STATE = ("start", "hidden_size", "layers", "norm", "regularisation")


def steps_without_quantization(options: ImageTokenizerConfig, max_steps: int) -> int:
    """First steps without quantization; raises UserError if they leave none to train the codebook."""
    given = options.quantize_after_steps
    if options.trained_part == TrainedPart.decoder:
        return 0
    if given is None:
        return min(USUAL_CONTINUOUS_STEPS, max_steps // _CONTINUOUS_PART)
    if given >= max_steps:
        raise UserError(
            f"image_tokenizer.quantize_after_steps={given} leaves none of trainer.max_steps={max_steps} to train the "
            "codebook; lower it (null: a quarter), or raise trainer.max_steps"
        )
    return given


def is_automatic(options: ImageTokenizerConfig) -> bool:
    """Whether the number of steps without quantization follows from the length of the run."""
    return options.quantize_after_steps is None and options.trained_part == TrainedPart.all


def check_losses(
    options: ImageTokenizerConfig, training: TrainingOptions, build: BuildOptimizer, init_from: str | None
) -> None:
    """Raises UserError for losses, and parts that are trained, that do not go with the rest of the run.

    Args:
        options: of the image tokenizer.
        training: options of the run.
        build: makes the optimizer.
        init_from: model to start from.
    """
    max_steps = training.trainer["max_steps"]
    continuous = steps_without_quantization(options, max_steps)
    if options.trained_part == TrainedPart.decoder:
        _check_decoder_alone(options, init_from)
    if options.perceptual is not None:
        check_perceptual(options.perceptual, options.image_size)
    if options.adversarial is not None:
        _check_adversarial(options.adversarial, options.image_size, continuous, max_steps)
        if options.adversarial.adaptive and training.compile:
            raise UserError(
                f"{_ADVERSARIAL}.adaptive=true takes the gradient of the decoder twice, which compiled code cannot do; "
                f"set compile=false or {_ADVERSARIAL}.adaptive=false"
            )
        _check_betas(options.adversarial.betas, build)


def adversarial_loss(config: AdversarialConfig | None) -> AdversarialLoss | None:
    """The adversarial loss with a new discriminator; None: there is none."""
    return None if config is None else AdversarialLoss(config)


def settings_of_losses(options: ImageTokenizerConfig) -> dict[str, Any]:
    """Settings that a resumed run must share, because its checkpoint has no state of another discriminator."""
    found = {"image_tokenizer.trained_part": options.trained_part.value}
    for name in _OF_THE_STATE:
        found[f"{_ADVERSARIAL}.{name}"] = plain(getattr(options.adversarial, name, None))
    return found


def _check_decoder_alone(options: ImageTokenizerConfig, init_from: str | None) -> None:
    if init_from is None:
        raise UserError(
            "image_tokenizer.trained_part=decoder trains the decoder of a trained image tokenizer; name it by init_from"
        )
    if options.quantize_after_steps:
        raise UserError(
            f"image_tokenizer.quantize_after_steps={options.quantize_after_steps}: with "
            "image_tokenizer.trained_part=decoder the codebook is trained already; set it to null or 0"
        )


def _check_adversarial(config: AdversarialConfig, edge: int, continuous: int, max_steps: int) -> None:
    start = f"{_ADVERSARIAL}.start={config.start}"
    if config.start >= max_steps:
        raise UserError(
            f"{start} leaves none of trainer.max_steps={max_steps} for the adversarial loss; lower it, raise "
            "trainer.max_steps, or set image_tokenizer/adversarial=none"
        )
    if config.start < continuous:
        raise UserError(
            f"{start}: the first {continuous} steps run without quantization; start after them, or lower "
            "image_tokenizer.quantize_after_steps"
        )
    if edge < smallest_edge(config.layers):
        raise UserError(
            f"{_ADVERSARIAL}.layers={config.layers} needs images of {smallest_edge(config.layers)} pixels at least, "
            f"image_tokenizer.image_size={edge}; lower {_ADVERSARIAL}.layers"
        )


def _check_betas(betas: list[float] | None, build: BuildOptimizer) -> None:
    if betas is None:
        return
    if len(betas) != 2:
        raise UserError(f"{_ADVERSARIAL}.betas={betas}: give two numbers, or null for those of the optimizer")
    if "betas" not in build([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]:
        raise UserError(f"{_ADVERSARIAL}.betas={betas}: the optimizer has no betas; set {_ADVERSARIAL}.betas=null")
