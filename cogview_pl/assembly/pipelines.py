"""The models that `task=generate` works with: a generator, and on request a captioner and an upscaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.config import Quantization, Sampling
from cogview_pl.generation.engine.decode_state import check_sampling
from cogview_pl.generation.pipeline import CogView
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.rerank import Captioner
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.transformer.model import Transformer

Other = TypeVar("Other", Captioner, Upscaler)


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image."""

    prompt: str
    seed: int
    image: Image.Image
    caption_loss: float | None
    """Nats per text token, lower is better; None without a captioner."""
    kept_per_prompt: int
    """Number of images of this prompt that were kept."""


@dataclass(frozen=True)
class GenerationPipeline:
    """Generator, captioner, upscaler and sampling; guidance applies to the generator alone."""

    generator: CogView
    captioner: Captioner | None
    upscaler: Upscaler | None
    sampling: Sampling

    def generate(
        self, prompts: Sequence[str], *, num_images_per_prompt: int, top_n: int | None, seed: int
    ) -> Iterator[GeneratedImage]:
        """Images of one prompt after those of another; with a captioner the best of a prompt come first.

        The k-th image of a prompt is sampled with `seed + k`. Of each prompt `top_n` images stay (None: all).
        """
        kept = min(top_n or num_images_per_prompt, num_images_per_prompt)
        codes = torch.cat(list(self.generator.codes(prompts, num_images_per_prompt, seed=seed, sampling=self.sampling)))
        texts = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        losses = self.captioner.losses(texts, codes, self.sampling.batch_size) if self.captioner else None
        chosen = [
            number
            for first in range(0, len(texts), num_images_per_prompt)
            for number in _best_first(range(first, first + num_images_per_prompt), losses)[:kept]
        ]
        seeds = [seed + number % num_images_per_prompt for number in chosen]
        texts = [texts[number] for number in chosen]
        images = self._images(texts, codes[chosen], seeds)
        for number, text, own_seed, image in zip(chosen, texts, seeds, images, strict=True):
            yield GeneratedImage(text, own_seed, image, losses[number] if losses else None, kept)

    def _images(self, texts: Sequence[str], codes: Tensor, seeds: Sequence[int]) -> Iterator[Image.Image]:
        if self.upscaler is not None:
            codes = self.upscaler.double(texts, codes, seeds=seeds, sampling=self.sampling.plain())
        for part in codes.split(self.sampling.batch_size):
            yield from self.generator.images(part)


@dataclass(frozen=True)
class Placement:
    """Device and number format of sequence models for inference."""

    device: str
    dtype: torch.dtype
    quantization: Quantization | None
    shard: Callable[[Transformer], None]
    """Distributes a model over the devices that generate together; does nothing on one device."""


def build_generator(loaded: SequenceModel, sampling: Sampling, placement: Placement) -> CogView:
    """The generator in place; raises UserError for a layout, sampling or quantization that it does not support."""
    check_sampling(loaded.model, sampling)
    placement.shard(loaded.model.to(placement.dtype))
    generator = CogView(loaded, placement.device)
    quantize(generator.transformer, placement.quantization)
    return generator


def build_other(
    kind: type[Other], loaded: SequenceModel, key: str, image_tokenizer: ImageTokenizer, placement: Placement
) -> Other:
    """Captioner (`rerank_with`) or upscaler (`upscale_with`) in place, for codes of the generator's image tokenizer.

    Raises:
        UserError: another layout, or, naming the config `key`, another image tokenizer.
    """
    if image_tokenizer.identity != loaded.image_tokenizer.identity:
        raise UserError(
            f"{key}: that model was trained with another image tokenizer than the one that generates; give one that "
            "was trained on the same tokenize run"
        )
    placement.shard(loaded.model.to(placement.dtype))
    return kind(loaded, placement.device, placement.dtype, placement.quantization)


def _best_first(numbers: Sequence[int], losses: Sequence[float] | None) -> list[int]:
    return sorted(numbers, key=lambda number: losses[number]) if losses else list(numbers)
