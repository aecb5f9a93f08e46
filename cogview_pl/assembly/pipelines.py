"""The models of `task=generate`: one generates, one may rank, one may double the edge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.assembly.models import inference_device
from cogview_pl.assembly.options import GenerationOptions
from cogview_pl.assembly.roles import CAPTIONER, GENERATOR, UPSCALER, Role, open_role
from cogview_pl.assembly.strategy import inference_sharding
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.config import SamplerConfig
from cogview_pl.generation.engine.decode_state import check_sampling
from cogview_pl.generation.pipeline import CogView
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.rerank import Captioner, Upscaler, require_same_codes
from cogview_pl.generation.sampling import Sampling
from cogview_pl.lit.config import StrategyKind
from cogview_pl.runs.samples_writer import GeneratedImage
from cogview_pl.vocab.config import TemplateConfig


@dataclass(frozen=True)
class GenerationPipeline:
    """Generator, captioner and upscaler; guidance is the generator's alone."""

    generator: CogView
    captioner: Captioner | None
    upscaler: Upscaler | None
    sampling: Sampling
    batch_size: int

    def generate(
        self, prompts: Sequence[str], *, num_images_per_prompt: int, top_n: int | None, seed: int
    ) -> Iterator[GeneratedImage]:
        """Images of each prompt, prompt by prompt; where they are ranked, the best first and `top_n` of each prompt.

        The k-th image of a prompt is sampled with `seed + k`.
        """
        kept = min(top_n or num_images_per_prompt, num_images_per_prompt)
        batches = self.generator.batches(
            prompts, num_images_per_prompt, seed=seed, sampling=self.sampling, batch_size=self.batch_size
        )
        codes = torch.cat(list(batches))
        texts = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        losses = self.captioner.losses(texts, codes, self.batch_size) if self.captioner else None
        chosen = [
            number
            for first in range(0, len(texts), num_images_per_prompt)
            for number in _ranked(range(first, first + num_images_per_prompt), losses)[:kept]
        ]
        seeds = [seed + number % num_images_per_prompt for number in chosen]
        texts = [texts[number] for number in chosen]
        codes = self._upscaled(texts, codes[chosen], seeds)
        for start in range(0, len(codes), self.batch_size):
            images = self.generator.decode(codes[start : start + self.batch_size])
            for place, image in enumerate(images, start):
                loss = losses[chosen[place]] if losses else None
                yield GeneratedImage(texts[place], seeds[place], to_pil_image(image), loss)

    def _upscaled(self, texts: Sequence[str], codes: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.upscaler is None:
            return codes
        plain = self.sampling.plain()  # the upscaler follows the image
        return self.upscaler.double(texts, codes, seeds=seeds, sampling=plain, batch_size=self.batch_size)


def open_generator(options: GenerationOptions, role: Role = GENERATOR) -> SequenceModel:
    """The model in `init_from`, or that of the newest run of the role's task."""
    return open_role(role, options.models, options.init_from, options.template)


def open_pipeline(options: GenerationOptions, generator: SequenceModel) -> GenerationPipeline:
    """Put the generator in place, and the other models that the options name.

    Raises:
        UserError: a model is missing, has another layout, or its codes mean something else than the generator's;
            guidance of a generator that cannot be guided; quantization that cannot be had.
    """
    device, dtype = inference_device(options.precision)
    if options.top_n is not None and options.rerank_with is None:
        raise UserError(f"top_n={options.top_n} keeps the best images, and nothing ranks them; set rerank_with")
    sampling = sampling_of(options.sampler)
    check_sampling(generator.model, sampling)
    _check_tensor_parallel(options)
    shard = inference_sharding(options.strategy, options.trainer)

    def in_place(role: Role, given: str | None, template: TemplateConfig) -> SequenceModel | None:
        if given is None:
            return None
        model = open_role(role, options.models, given, template)
        require_same_codes(generator.image_tokenizer, model, role.key)
        shard(model.model.to(dtype))
        return model

    shard(generator.model.to(dtype))
    cogview = CogView(generator, device)
    quantization = options.quantization and options.quantization.value
    quantize(cogview.transformer, quantization)
    captioner = in_place(CAPTIONER, options.rerank_with, options.rerank_template)
    upscaler = in_place(UPSCALER, options.upscale_with, options.upscale_template)
    pipeline = GenerationPipeline(
        cogview,
        None if captioner is None else Captioner(captioner, device, dtype, quantization),
        None if upscaler is None else Upscaler(upscaler, device, dtype, quantization),
        sampling,
        options.sampler.batch_size,
    )
    if pipeline.upscaler is not None and pipeline.upscaler.grid != cogview.grid:
        raise UserError(
            f"upscale_with: the model takes {pipeline.upscaler.grid} codes, the generator makes {cogview.grid}"
        )
    return pipeline


def _check_tensor_parallel(options: GenerationOptions) -> None:
    if options.strategy.kind != StrategyKind.tp:
        return
    if options.task != "generate":
        raise UserError(
            f"strategy=tp trains and generates, task={options.task} runs on one device; set strategy=single"
        )
    if options.quantization is not None:
        raise UserError(
            "strategy=tp divides matrices that quantization= would pack; set quantization=null or strategy=single"
        )


def sampling_of(options: SamplerConfig) -> Sampling:
    """Temperature, filters and guidance."""
    values = asdict(options)
    del values["batch_size"]
    return Sampling(**{**values, "algorithm": options.algorithm.value})


def _ranked(numbers: Sequence[int], losses: Sequence[float] | None) -> list[int]:
    return sorted(numbers, key=lambda number: losses[number]) if losses else list(numbers)
