"""Images in TensorBoard: reconstructions in stage 1, samples in stage 2."""

from __future__ import annotations

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from cogview_pl.generation.config import Sampling
from cogview_pl.generation.contact_sheet import contact_sheet
from cogview_pl.lit.bars import Bar
from cogview_pl.lit.image_tokenizer import ImageTokenizerModule, reconstruction_grid
from cogview_pl.lit.sequence_model import SequenceModule

_CELL = 128


class Reconstructions(Callback):
    """Shows the same validation images above their reconstructions, at every validation.

    Args:
        num_images: number of images.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not _logs_images(trainer):
            return
        assert isinstance(pl_module, ImageTokenizerModule)
        grid = reconstruction_grid(pl_module.model, trainer.datamodule.val, self.num_images)  # type: ignore[attr-defined]
        _log_image(trainer, "val/originals_over_reconstructions", (grid * 255).to(torch.uint8))


class Samples(Callback):
    """Shows images that the model generates from captions of the validation split, with the captions.

    Args:
        num_prompts: number of captions.
        font: font file; None: an installed font.
        seed: seed of the sampling, the same at every validation.
    """

    def __init__(self, num_prompts: int, font: str | None = None, seed: int = 0) -> None:
        self.num_prompts = num_prompts
        self.font = font
        self.seed = seed

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not _logs_images(trainer):
            return
        assert isinstance(pl_module, SequenceModule)
        prompts = pl_module.val_prompts[: self.num_prompts]
        generator = pl_module.generator
        if generator is None or not prompts:
            return
        unfiltered = Sampling(top_k=0, batch_size=len(prompts))
        y, x = generator.grid
        with Bar("sample", len(prompts) * y * x, "codes") as bar:
            codes = generator.codes(prompts, seed=self.seed, sampling=unfiltered, on_codes=bar.update)
            images = [image for batch in codes for image in generator.images(batch)]
        rows = [(prompt, [image]) for prompt, image in zip(prompts, images, strict=True)]
        sheet = contact_sheet(rows, columns=4, cell=_CELL, font=self.font)
        _log_image(trainer, "val/samples", pil_to_tensor(sheet))


def _logs_images(trainer: Trainer) -> bool:
    return trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger)


def _log_image(trainer: Trainer, tag: str, image: Tensor) -> None:
    trainer.logger.experiment.add_image(tag, image.cpu(), trainer.global_step)  # type: ignore[union-attr]
