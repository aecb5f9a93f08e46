"""task=vqvae: train stage 1."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import Any

from torchvision.utils import save_image

from cogview_pl.checkpoints.store import IMAGE_TOKENIZER, ImageTokenizer, build_vqvae, save_image_tokenizer
from cogview_pl.config import Config, ImageTokenizerConfig
from cogview_pl.data.skips import collate_images
from cogview_pl.durable import replacing
from cogview_pl.errors import UserError
from cogview_pl.lit.data import DataModule
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule, reconstruction_grid
from cogview_pl.tasks.compiler import prepare_compiler
from cogview_pl.tasks.models import check_precision, open_image_tokenizer
from cogview_pl.tasks.run_folder import RunFolder
from cogview_pl.tasks.sources import open_images
from cogview_pl.tasks.training import optimizer_factory, seed, train

_SHEET_PICTURES = 16  # validation pictures in reconstructions.png
_TRAINING_KEYS = ("path", "image_size", "grid", "reconstruction", "reconstruction_weight", "continuous_steps")


def run(config: Config, folder: RunFolder) -> dict[str, float]:
    """Train the image tokenizer and write `model/`."""
    check_precision(config)
    prepare_compiler(config)
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
    module = ImageTokenizerModule(
        model,
        reconstruction=options.reconstruction.value,
        reconstruction_weight=options.reconstruction_weight,
        continuous_steps=options.continuous_steps,
        optimizer=optimizer_factory(config.optimizer),
    )
    data = DataModule(
        open_images(config.data, "train"),  # type: ignore[arg-type]
        open_images(config.data, "val"),  # type: ignore[arg-type]
        collate=collate_images,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
    )
    metrics = train(config, folder, module, data, {"kind": IMAGE_TOKENIZER, "settings": settings})
    if module.global_rank == 0:
        tokenizer = ImageTokenizer(model, {**settings, "image_size": options.image_size})
        save_image_tokenizer(folder / "model", tokenizer)
        with replacing(folder / "reconstructions.png") as draft:
            save_image(reconstruction_grid(model, data.val, _SHEET_PICTURES), draft, format="png")
    return metrics


def vqvae_settings(config: ImageTokenizerConfig) -> dict[str, Any]:
    """Constructor arguments of the VQ-VAE, as plain values; raises UserError if sizes do not fit together."""
    if config.grid * config.downsampling != config.image_size:
        raise UserError(
            f"image_tokenizer.grid={config.grid}: {config.image_size} pixels at {config.downsampling} pixels per code "
            f"make {config.image_size / config.downsampling:g}; change image_size, downsampling or grid"
        )
    settings = {key: value for key, value in asdict(config).items() if key not in _TRAINING_KEYS}
    return plain(settings)


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Enums replaced by their values, so that settings can be saved and compared."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in settings.items()}


def require_same(found: Any, wanted: dict[str, Any], source: str) -> None:
    """Raises UserError naming the first setting in which a model to start from differs from this run's."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f"{source} has {key}={found.get(key)}, this run {value}; choose the same model")
