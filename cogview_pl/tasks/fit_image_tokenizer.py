"""task=vqvae: train stage 1."""

from __future__ import annotations

from typing import Any

from torchvision.utils import save_image

from cogview_pl.assembly.checks import check_levers
from cogview_pl.assembly.compiler import prepare_compiler
from cogview_pl.assembly.image_data import image_inputs, open_images
from cogview_pl.assembly.model_specs import vqvae_settings
from cogview_pl.assembly.models import check_precision, model_hash, open_image_tokenizer
from cogview_pl.assembly.strategy import check_strategy
from cogview_pl.assembly.trainer import optimizer_factory, seed, train
from cogview_pl.checkpoints.model_folder import IMAGE_TOKENIZER, ImageTokenizer, build_vqvae, save_image_tokenizer
from cogview_pl.config.schema import Config
from cogview_pl.data.bad_samples import collate_images
from cogview_pl.durable.write import replacing
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.lit.data_module import DataModule
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule, reconstruction_grid
from cogview_pl.runs.run_folder import RunFolder

_SHEET_IMAGES = 16  # validation images in reconstructions.png


def check(config: Config) -> None:
    """Raises UserError for what does not go together, before anything is read."""
    check_precision(config)
    if config.lora.rank:
        raise UserError(f"lora.rank={config.lora.rank}: LoRA is for finetunes of sequence models; set lora.rank=0")
    if config.precision.get("precision") == "bf16-true":
        raise UserError("precision=bf16_true: the averages of a codebook need fp32; use precision=bf16 for task=vqvae")
    check_levers(config)
    check_strategy(config, spreads=False)
    prepare_compiler(config)
    optimizer_factory(config)


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train the image tokenizer and write `model/`."""
    seed(config)
    options = config.image_tokenizer
    settings = vqvae_settings(options)
    model = build_vqvae(settings)
    if config.init_from is not None:
        start = open_image_tokenizer(config, config.init_from, "init_from")
        require_same(start.settings, settings, f"init_from={config.init_from}")
        model.load_state_dict(start.model.state_dict())
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
    if options.quantize_after_steps and any(True for _ in model.quantizer.parameters()):
        _expect_unused(config)
    module = ImageTokenizerModule(
        model,
        reconstruction=options.reconstruction,
        reconstruction_weight=options.reconstruction_weight,
        quantize_after_steps=options.quantize_after_steps,
        optimizer=optimizer_factory(config),
    )
    train_images, val_images = open_images(config.data, "train"), open_images(config.data, "val")
    data = DataModule(
        train_images,  # type: ignore[arg-type]
        val_images,  # type: ignore[arg-type]
        collate=collate_images,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
        worker_timeout=config.data.worker_timeout,
        look=SIGNALS.check_while_waiting,
    )
    inputs = image_inputs({"train": train_images, "val": val_images})
    if config.init_from is not None:
        inputs["init_from"] = model_hash(config.init_from)
    metrics = train(config, folder, module, data, {"kind": IMAGE_TOKENIZER, "settings": settings}, inputs)
    if folder.writes:
        tokenizer = ImageTokenizer(model, {**settings, "image_size": options.image_size})
        save_image_tokenizer(folder / "model", tokenizer)
        with replacing(folder / "reconstructions.png") as draft:
            save_image(reconstruction_grid(model, data.val, _SHEET_IMAGES), draft, format="png")
    return metrics


def _expect_unused(config: Config) -> None:
    """DDP waits for the gradient of every parameter, also of a codebook that the first steps do not use."""
    if isinstance(config.strategy.strategy, dict):
        config.strategy.strategy["find_unused_parameters"] = True


def require_same(found: Any, wanted: dict[str, Any], source: str) -> None:
    """Raises UserError naming the first setting in which a model to start from differs from this run's."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f"{source} has {key}={found.get(key)}, this run {value}; choose the same model")
