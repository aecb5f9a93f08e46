"""task=vqvae: train stage 1."""

from __future__ import annotations

import logging

from torchvision.utils import save_image

from cogview_pl.assembly.checks import check_training, prepare_compiler
from cogview_pl.assembly.collapse import collapse
from cogview_pl.assembly.image_data import image_inputs, open_images
from cogview_pl.assembly.image_tokenizer_losses import (
    USUAL_CONTINUOUS_STEPS,
    adversarial_loss,
    check_losses,
    is_automatic,
    settings_of_losses,
    steps_without_quantization,
)
from cogview_pl.assembly.kept_checkpoints import check_kept
from cogview_pl.assembly.model_specs import vqvae_settings
from cogview_pl.assembly.models import open_image_tokenizer, require_same
from cogview_pl.assembly.perceptual import perceptual_loss
from cogview_pl.assembly.trainer import data_module, optimizer_factory, seed_all, train
from cogview_pl.checkpoints.model_folder import IMAGE_TOKENIZER, ImageTokenizer, build_vqvae, save_image_tokenizer
from cogview_pl.checkpoints.model_hash import model_hash
from cogview_pl.checkpoints.training_checkpoint import image_tokenizer_parts
from cogview_pl.config.parts import model_options, training_options
from cogview_pl.config.schema import Config
from cogview_pl.data.bad_samples import collate_images
from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError
from cogview_pl.evaluation.protocol import digest_of_weights
from cogview_pl.lit.config import StrategyConfig
from cogview_pl.lit.image_tokenizer import VALIDATION_METRICS, ImageTokenizerModule, reconstruction_grid
from cogview_pl.runs.run_folder import RunFolder
from cogview_pl.vqvae.config import EXTERNAL_KEY, TrainedPart

_SHEET_IMAGES = 16  # validation images in reconstructions.png

_log = logging.getLogger(__name__)


def check(config: Config) -> None:
    """Raises UserError for options that exclude each other, before any file is read."""
    if config.lora.rank:
        raise UserError(f"lora.rank={config.lora.rank}: LoRA is for finetunes of sequence models; set lora.rank=0")
    if config.precision.get("precision") == "bf16-true":
        raise UserError("precision=bf16_true: the averages of a codebook need fp32; use precision=bf16 for task=vqvae")
    if config.image_tokenizer.external is not None:
        raise UserError(
            f"{EXTERNAL_KEY} names a trained image tokenizer; task=vqvae trains the project's own, choose another "
            "image_tokenizer, or go on with task=tokenize"
        )
    options = training_options(config)
    check_training(options, shardable=False)
    check_kept(options, VALIDATION_METRICS)
    prepare_compiler(options)
    check_losses(config.image_tokenizer, options, optimizer_factory(options), config.init_from)


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train the image tokenizer and write `model/`."""
    seed_all(config.seed)
    training, tokenizer = training_options(config), config.image_tokenizer
    settings = vqvae_settings(tokenizer)
    model = build_vqvae(settings)
    if config.init_from is not None:
        start = open_image_tokenizer(model_options(config), config.init_from, "init_from")
        require_same(start.settings, settings, f"init_from={config.init_from}")
        model.load_state_dict(start.model.state_dict())
    if tokenizer.trained_part == TrainedPart.decoder:
        model.freeze_codes()
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
    max_steps = config.trainer["max_steps"]
    continuous = steps_without_quantization(tokenizer, max_steps)
    if continuous < USUAL_CONTINUOUS_STEPS and is_automatic(tokenizer) and folder.writes:
        _log.info(
            f"trainer.max_steps={max_steps}: the first {continuous} steps run without quantization instead of "
            f"{USUAL_CONTINUOUS_STEPS}; image_tokenizer.quantize_after_steps chooses another number"
        )
    adversarial, perceptual = adversarial_loss(tokenizer.adversarial), None
    if tokenizer.perceptual is not None:
        perceptual = perceptual_loss(tokenizer.perceptual, config.outputs, verify=config.verify)
    if adversarial is not None or (continuous and any(True for _ in model.quantizer.parameters())):
        _expect_unused(config.strategy)
    module = ImageTokenizerModule(
        model,
        reconstruction=tokenizer.reconstruction,
        reconstruction_weight=tokenizer.reconstruction_weight,
        quantize_after_steps=continuous,
        adversarial=adversarial,
        perceptual=perceptual,
        optimizer=config.optimizer,
        build_optimizer=optimizer_factory(training),
    )
    train_images, val_images = (open_images(config.data, split, text_fields=()) for split in ("train", "val"))
    data = data_module(train_images, val_images, collate_images, config.data, training)
    inputs = image_inputs({"train": train_images, "val": val_images})
    if config.init_from is not None:
        inputs["init_from"] = model_hash(config.init_from)
    if perceptual is not None:
        inputs["image_tokenizer.perceptual"] = digest_of_weights(perceptual.distance)
    saved = {**settings, "image_size": tokenizer.image_size}
    identity = {"kind": IMAGE_TOKENIZER, "settings": settings, "model": image_tokenizer_parts(saved)}
    losses = settings_of_losses(tokenizer)
    metrics = train(training, folder, module, data, identity=identity, settings=losses, inputs=inputs)
    if folder.writes:
        warning = collapse(
            metrics,
            tokenizer,
            codes_counted=module.codes_counted,
            steps=max_steps - continuous,
            optimizer=config.optimizer.optimizer,
        )
        if warning is not None:
            folder.remarks.append(warning)
        save_image_tokenizer(folder / "model", ImageTokenizer(model, saved))
        if len(val_images):
            with replacing(folder / "reconstructions.png") as draft:
                save_image(reconstruction_grid(model, data.val, _SHEET_IMAGES), draft, format="png")
    return metrics


def _expect_unused(strategy: StrategyConfig) -> None:
    """Tell DDP not to wait for gradients of codebook and discriminator, which the first steps do not use."""
    if isinstance(strategy.strategy, dict):
        strategy.strategy["find_unused_parameters"] = True
