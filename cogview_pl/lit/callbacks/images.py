"""Images for the loggers: reconstructions in stage 1, samples in stage 2."""

from __future__ import annotations

import torch
from lightning import Callback, LightningModule, Trainer
from torchvision.transforms.v2.functional import pil_to_tensor

from cogview_pl.generation.config import Sampling
from cogview_pl.generation.contact_sheet import joined
from cogview_pl.lit.bars import Bar
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule, reconstruction_grid
from cogview_pl.lit.loggers import log_images, takes_images
from cogview_pl.lit.sequence_model import SequenceModule


class Reconstructions(Callback):
    """Shows the same validation images above their reconstructions, at every validation.

    Args:
        num_images: number of images.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not takes_images(trainer):
            return
        assert isinstance(pl_module, ImageTokenizerModule)
        grid = reconstruction_grid(pl_module.model, trainer.datamodule.val, self.num_images)  # type: ignore[attr-defined]
        log_images(trainer, "val/originals_over_reconstructions", [(grid * 255).to(torch.uint8)])


class Samples(Callback):
    """Shows images that the model generates from captions of the validation split, with the captions.

    A model that makes images from images shows the source image next to each.

    Args:
        num_prompts: number of captions.
        seed: seed of the sampling, the same at every validation.
    """

    def __init__(self, num_prompts: int, seed: int = 0) -> None:
        self.num_prompts = num_prompts
        self.seed = seed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not takes_images(trainer):
            return
        assert isinstance(pl_module, SequenceModule)
        prompts, sources = pl_module.val_prompts[: self.num_prompts], pl_module.val_sources
        generator = pl_module.generator
        if generator is None or not prompts:
            return
        unfiltered = Sampling(top_k=0, batch_size=len(prompts))
        y, x = generator.grid
        with Bar("sample", len(prompts) * y * x, "codes") as bar:
            given = None if sources is None else sources[: len(prompts)]
            codes = generator.codes(prompts, sources=given, seed=self.seed, sampling=unfiltered, on_codes=bar.update)
            images = [image for batch in codes for image in generator.images(batch)]
        if given is not None:
            images = [joined(pair) for pair in zip(generator.images(given), images, strict=True)]
        log_images(trainer, "val/samples", [pil_to_tensor(image) for image in images], prompts)
