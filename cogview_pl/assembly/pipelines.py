"""The models of `task=generate`: a generator, and optionally a captioner that ranks and an upscaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from PIL import Image
from torch import Tensor

from cogview_pl.assembly.devices import inference_device
from cogview_pl.assembly.engines import engine_settings
from cogview_pl.assembly.guidance import warn_of_guidance
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.roles import CAPTIONER, GENERATOR, UPSCALER, Role, open_role
from cogview_pl.assembly.strategy import inference_sharding
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.codes import decode_codes
from cogview_pl.generation.config import Sampling
from cogview_pl.generation.decode import TO_SAMPLE
from cogview_pl.generation.engine.decode_state import check_sampling
from cogview_pl.generation.engine.forms import keep_forms
from cogview_pl.generation.pipeline import ImageGenerator, pil_images
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.rerank import Captioner
from cogview_pl.generation.super_resolution.consistency import consistent
from cogview_pl.generation.super_resolution.upscale import Upscaler
from cogview_pl.lit.bars import Bar
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.run_folder import predecessor
from cogview_pl.runs.samples_writer import GeneratedImage
from cogview_pl.vocab.config import TemplateConfig


@dataclass(frozen=True)
class GenerationPipeline:
    """Generator, captioner, upscaler and sampling options; guidance applies to the generator alone."""

    generator: ImageGenerator
    captioner: Captioner | None
    upscaler: Upscaler | None
    sampling: Sampling

    def generate(
        self,
        prompts: Sequence[str],
        *,
        sources: Tensor | None = None,
        num_images_per_prompt: int,
        top_n: int | None,
        seed: int,
        known: Tensor | None = None,
        on_codes: Callable[[int], None] = lambda count: None,
    ) -> Iterator[GeneratedImage]:
        """Images, prompt by prompt; with a captioner, the images of a prompt are ordered by caption loss, best first.

        Without a captioner, completed images are ordered by the likelihood of the given codes after generated ones.

        Args:
            prompts: prompts.
            sources: codes `(prompts, y, x)` of a source image for each, if the generator makes images from images.
            num_images_per_prompt: images to sample per prompt; image k is sampled with `seed + k`.
            top_n: images to keep per prompt; None: all.
            seed: seed of the first image of each prompt.
            known: given codes of the images of each prompt, as for `ImageGenerator.completions`; None: there are none.
            on_codes: called with the number of codes that each step of a batch samples, for progress bars.
        """
        kept = min(top_n or num_images_per_prompt, num_images_per_prompt)
        if known is None:
            known = torch.full((len(prompts), *self.generator.grid), TO_SAMPLE)
        batches = self.generator.completions(
            prompts,
            known,
            num_images_per_prompt,
            sources=sources,
            seed=seed,
            sampling=self.sampling,
            on_codes=on_codes,
        )
        parts, losses_of_parts = zip(*batches, strict=True)
        codes = torch.cat(parts)
        given_losses = None if losses_of_parts[0] is None else list(chain.from_iterable(losses_of_parts))
        texts = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        losses = self.captioner.losses(texts, codes, self.sampling.batch_size) if self.captioner else None
        chosen = [
            number
            for first in range(0, len(texts), num_images_per_prompt)
            for number in _best_first(range(first, first + num_images_per_prompt), losses or given_losses)[:kept]
        ]
        seeds = [seed + number % num_images_per_prompt for number in chosen]
        texts = [texts[number] for number in chosen]
        images = self._images(texts, codes[chosen], seeds)
        for number, text, own_seed, image in zip(chosen, texts, seeds, images, strict=True):
            yield GeneratedImage(
                text,
                own_seed,
                image,
                losses[number] if losses else None,
                given_losses[number] if given_losses else None,
            )

    def engines(self) -> dict[str, str]:
        """See `engine_settings`."""
        models = {GENERATOR: self.generator.transformer}
        if self.upscaler is not None:
            models[UPSCALER] = self.upscaler.model
        return engine_settings(models, self.sampling)

    def _images(self, texts: Sequence[str], codes: Tensor, seeds: Sequence[int]) -> Iterator[Image.Image]:
        if self.upscaler is None:
            for part in codes.split(self.sampling.batch_size):
                yield from self.generator.images(part)
            return
        with Bar("upscale", self.upscaler.num_steps(len(codes), self.sampling.batch_size), "windows") as bar:
            large = self.upscaler.double(
                texts, codes, seeds=seeds, sampling=self.sampling.plain(), on_window=bar.update
            )
        size, tokenizer = self.sampling.batch_size, self.generator.image_tokenizer
        for grids in zip(codes.split(size), large.split(size), strict=True):
            small, enlarged = (decode_codes(grid, tokenizer, size) for grid in grids)
            yield from pil_images(consistent(enlarged, small, self.sampling.consistency))


def open_generator(options: GenerationOptions, role: Role = GENERATOR) -> SequenceModel:
    """The model in `init_from`, or in the newest run of the role's task."""
    return open_role(role, options.models, options.init_from, options.template)


def open_pipeline(options: GenerationOptions, generator: SequenceModel) -> GenerationPipeline:
    """Put the generator and the other models of the options on the device.

    Raises:
        UserError: a model is missing or has another layout; its image tokenizer differs from the generator's; the
            generator does not support guidance; quantization is not available.
    """
    device, dtype = inference_device(options.trainer, options.precision)
    if options.top_n is not None and options.rerank_with is None and not options.complete.wanted:
        raise UserError(f"top_n={options.top_n} keeps the best images, and nothing ranks them; set rerank_with")
    sampling = options.sampler
    if sampling.consistency and options.upscale_with is None:
        raise UserError(
            f"sampler.consistency={sampling.consistency:g} is for enlarged images, and nothing enlarges them; set "
            "upscale_with, or leave it out"
        )
    check_sampling(generator.model, sampling)
    warn_of_guidance(sampling, predecessor(options.models.outputs, GENERATOR.task, GENERATOR.key, options.init_from))
    _check_tensor_parallel(options)
    shard = inference_sharding(options.strategy, options.trainer)

    def in_place(role: Role, given: str | None, template: TemplateConfig) -> SequenceModel | None:
        if given is None:
            return None
        model = open_role(role, options.models, given, template)
        require_same_tokenizer(role.key, model, generator)
        shard(model.model.to(dtype))
        return model

    shard(generator.model.to(dtype))
    images = ImageGenerator(generator, device)
    quantize(images.transformer, options.quantization)
    keep_forms(images.transformer)
    captioner = in_place(CAPTIONER, options.rerank_with, options.rerank_template)
    upscaler = in_place(UPSCALER, options.upscale_with, options.upscale_template)
    pipeline = GenerationPipeline(
        images,
        None if captioner is None else Captioner(captioner, device, dtype, options.quantization),
        None if upscaler is None else Upscaler(upscaler, device, dtype, options.quantization),
        sampling,
    )
    if pipeline.upscaler is not None:
        require_grid(pipeline.upscaler, pipeline.generator)
    return pipeline


def require_same_tokenizer(key: str, model: SequenceModel, generator: SequenceModel) -> None:
    """Raises UserError if the model of a key was trained with another image tokenizer than the generator."""
    if generator.image_tokenizer.identity != model.image_tokenizer.identity:
        raise UserError(
            f"{key}: that model was trained with another image tokenizer than the generator; give one that was trained "
            "on the same tokenize run"
        )


def require_grid(upscaler: Upscaler, generator: ImageGenerator) -> None:
    """Raises UserError if an upscaler takes images of another size than the generator makes."""
    if upscaler.grid != generator.grid:
        raise UserError(f"upscale_with: the model takes {upscaler.grid} codes, the generator makes {generator.grid}")


def _check_tensor_parallel(options: GenerationOptions) -> None:
    if options.strategy.kind != StrategyKind.tp:
        return
    if options.task != "generate":
        raise UserError(
            f"strategy=tp trains and generates, but task={options.task} runs on one device; set strategy=single"
        )
    if options.quantization is not None:
        raise UserError("strategy=tp cannot divide quantized matrices; set quantization=null or strategy=single")


def _best_first(numbers: Sequence[int], losses: Sequence[float] | None) -> list[int]:
    return sorted(numbers, key=lambda number: losses[number]) if losses else list(numbers)
