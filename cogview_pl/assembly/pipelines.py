"""The models that `task=generate` works with: one paints, one may rank, one may enlarge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.assembly.models import inference_device, open_sequence_model, quantization
from cogview_pl.assembly.strategy import inference_spread
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.config.schema import Config
from cogview_pl.errors import UserError
from cogview_pl.generation.engine.decode_state import check_sampling
from cogview_pl.generation.pipeline import CogView
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.rerank import Captioner, Upscaler, require_same_codes
from cogview_pl.generation.sampling import Sampling
from cogview_pl.runs.run_folder import predecessor


@dataclass(frozen=True)
class Painting:
    """A finished image."""

    prompt: str
    seed: int
    image: Image.Image
    caption_loss: float | None
    """Nats per text token, the lower the better; None without a captioner."""
    of: int
    """Images kept per prompt."""


@dataclass(frozen=True)
class Studio:
    """Painter, captioner and upscaler, and how tokens are drawn; guidance is the painter's alone."""

    painter: CogView
    captioner: Captioner | None
    upscaler: Upscaler | None
    sampling: Sampling
    batch_size: int

    def paint(
        self, prompts: Sequence[str], *, num_images_per_prompt: int, top_n: int | None, seed: int
    ) -> Iterator[tuple[int, Painting]]:
        """Numbered images, those of one prompt after those of another, the best first where they are ranked.

        The k-th image painted of a prompt is drawn with `seed + k`.
        """
        kept = min(top_n or num_images_per_prompt, num_images_per_prompt)
        codes = torch.cat(
            list(
                self.painter.batches(
                    prompts, num_images_per_prompt, seed=seed, sampling=self.sampling, batch_size=self.batch_size
                )
            )
        )
        texts = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        losses = self.captioner.losses(texts, codes, self.batch_size) if self.captioner else None
        chosen = [
            number
            for first in range(0, len(texts), num_images_per_prompt)
            for number in _best(range(first, first + num_images_per_prompt), losses)[:kept]
        ]
        seeds = [seed + number % num_images_per_prompt for number in chosen]
        texts = [texts[number] for number in chosen]
        for place, image in enumerate(self._images(texts, codes[chosen], seeds)):
            loss = losses[chosen[place]] if losses else None
            yield place, Painting(texts[place], seeds[place], image, loss, kept)

    def _images(self, texts: Sequence[str], codes: Tensor, seeds: Sequence[int]) -> Iterator[Image.Image]:
        if self.upscaler is not None:
            plain = self.sampling.plain()  # the upscaler follows the image
            codes = self.upscaler.double(texts, codes, seeds=seeds, sampling=plain, batch_size=self.batch_size)
        for start in range(0, len(codes), self.batch_size):
            yield from map(to_pil_image, self.painter.decode(codes[start : start + self.batch_size]))


def open_painter(config: Config) -> SequenceModel:
    """The model in `init_from`; by default the newest run of task=pretrain, or of task=caption if `images` is set."""
    task = "pretrain" if config.images is None else "caption"
    path = predecessor(config.outputs, task, "init_from", config.init_from)
    return open_sequence_model(config, path, "init_from", config.template)


def open_studio(config: Config, loaded: SequenceModel) -> Studio:
    """The painter `loaded`, and the other models that the configuration names.

    Raises:
        UserError: one is missing, has another layout, or its codes mean something else than the painter's; guidance
            of a painter that cannot be guided; `weights` that cannot be had.
    """
    device, dtype = inference_device(config)
    if config.top_n is not None and config.rerank_with is None:
        raise UserError(f"top_n={config.top_n} keeps the best images, and nothing ranks them; set rerank_with")
    drawing = sampling(config)
    check_sampling(loaded.model, drawing)
    spread = inference_spread(config)
    spread(loaded.model.to(dtype))
    painter = CogView(loaded, device)
    quantize(painter.transformer, quantization(config))
    captioner = upscaler = None
    if config.rerank_with is not None:
        found = open_sequence_model(config, config.rerank_with, "rerank_with", config.rerank_template)
        require_same_codes(loaded.image_tokenizer, found, "rerank_with")
        spread(found.model.to(dtype))
        captioner = Captioner(found, device, dtype, quantization(config))
    if config.upscale_with is not None:
        found = open_sequence_model(config, config.upscale_with, "upscale_with", config.upscale_template)
        require_same_codes(loaded.image_tokenizer, found, "upscale_with")
        spread(found.model.to(dtype))
        upscaler = Upscaler(found, device, dtype, quantization(config))
        if upscaler.grid != painter.grid:
            raise UserError(f"upscale_with: the model takes {upscaler.grid} codes, the painter makes {painter.grid}")
    return Studio(painter, captioner, upscaler, drawing, config.sampler.batch_size)


def sampling(config: Config) -> Sampling:
    """How tokens are drawn, guidance included."""
    options = config.sampler
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=options.guidance,
        algorithm=options.algorithm.value,  # type: ignore[arg-type]
        drafts=options.drafts,
        cuda_graphs=options.cuda_graphs,
    )


def _best(numbers: Sequence[int], losses: Sequence[float] | None) -> list[int]:
    return sorted(numbers, key=lambda number: losses[number]) if losses else list(numbers)
