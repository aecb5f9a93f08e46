"""From prompts to images by one sequence model; `assembly/cogview.py` is the Python API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.codes import decode_codes
from cogview_pl.generation.completion import check_algorithm
from cogview_pl.generation.config import Algorithm, Sampling
from cogview_pl.generation.decode import TO_SAMPLE, decode
from cogview_pl.generation.speculative import decode_jacobi
from cogview_pl.transformer.config import NormScope
from cogview_pl.vocab import CodeSlot, makes_images, source_slots


class CompletedCodes(NamedTuple):
    """Codes of B images, some of them given."""

    codes: Tensor
    """int64 `(B, y, x)`, on the CPU."""
    given_losses: list[float] | None
    """Mean negative log-likelihood of the given codes that follow a generated one, in nats per code, by image. None
    where none do, so that the images of a prompt do not differ in it."""


class ImageGenerator:
    """A trained sequence model with its tokenizers, which makes images from texts, or from texts and source images.

    Args:
        loaded: both models, template and text tokenizer. Their mode is not changed: loaded models are in evaluation
            mode, and a trainer switches the model that it trains.
        device: device to move both models to; None leaves them where they are.

    Raises:
        UserError: another layout.
    """

    def __init__(self, loaded: SequenceModel, device: torch.device | str | None = None) -> None:
        self.template = loaded.template
        self.text = loaded.text
        self.transformer = loaded.model
        self.image_tokenizer = loaded.image_tokenizer.model
        if device is not None:
            self.transformer.to(device)
            self.image_tokenizer.to(device)
        if not makes_images(self.template):
            raise UserError(
                f"this model's layout, {self.template.layout}, is not a text, then an image; give a run of "
                "task=pretrain or task=style (a super-resolution model goes into upscale_with= or task=magnify)"
            )
        self._text: str
        self._source: str | None  # slot of the source image
        self._text, self._source = source_slots(self.template) or ("text", None)

    @property
    def takes_sources(self) -> bool:
        """Whether it makes images from texts and source images."""
        return self._source is not None

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of an image."""
        assert isinstance(self.template.target, CodeSlot)
        return self.template.target.grid

    def codes(
        self,
        prompts: Sequence[str],
        num_images_per_prompt: int = 1,
        *,
        sources: Tensor | None = None,
        seed: int = 0,
        sampling: Sampling,
        on_codes: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Tensor]:
        """Codes `(B, y, x)`, int64 on the CPU, of all images in order, at most `sampling.batch_size` at a time.

        `sources` are the codes of a source image for each prompt, int64 `(prompts, y, x)`, for a model that takes them.
        Guidance leaves out the text alone.

        `on_codes` is called with the number of codes of each step of a batch, one for each image, for progress bars.
        With `norm_scope=tensor` a batch holds images of one prompt only, as in the original.

        Raises:
            UserError: guidance or `jacobi` with `norm_scope="tensor"`; a prompt is longer than the text slot;
                sources are missing, or are given to a model that takes none.
        """
        nothing = torch.full((len(prompts), *self.grid), TO_SAMPLE)
        for completed in self.completions(
            prompts, nothing, num_images_per_prompt, sources=sources, seed=seed, sampling=sampling, on_codes=on_codes
        ):
            yield completed.codes

    def completions(
        self,
        prompts: Sequence[str],
        known: Tensor,
        num_images_per_prompt: int = 1,
        *,
        sources: Tensor | None = None,
        seed: int = 0,
        sampling: Sampling,
        on_codes: Callable[[int], None] = lambda count: None,
    ) -> Iterator[CompletedCodes]:
        """Codes of all images, of which some are given for each prompt; see `codes`.

        Args:
            prompts: P prompts.
            known: given codes, int64 `(P, y, x)`, and `TO_SAMPLE` at the same places in all of them.
            num_images_per_prompt, sources, seed, sampling, on_codes: as for `codes`.

        Raises:
            UserError: as for `codes`; `jacobi` where given codes follow generated ones.
        """
        check_algorithm(known[0] == TO_SAMPLE, sampling)
        given = known.flatten(1)
        numbers = [number for number in range(len(prompts)) for _ in range(num_images_per_prompt)]
        texts = self.tokenise(prompts, sources)
        without_text = self.tokenise([""] * len(prompts), sources)
        length = num_images_per_prompt if self.transformer.norm_scope == NormScope.tensor else len(numbers)
        for first in range(0, len(numbers), length):
            for start in range(first, first + length, sampling.batch_size):
                batch = range(start, min(start + sampling.batch_size, first + length))
                chosen = [numbers[job] for job in batch]
                yield self._decode(
                    [texts[number] for number in chosen],
                    [without_text[number] for number in chosen],
                    given[chosen],
                    [seed + job % num_images_per_prompt for job in batch],
                    sampling,
                    partial(on_codes, len(batch)),
                )

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        unconditional: Sequence[Sequence[int]],
        known_BT: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        on_step: Callable[[], None],
    ) -> CompletedCodes:
        """A batch of `completions`."""
        scores: list[Tensor] = []
        if sampling.algorithm == Algorithm.jacobi:
            rows = decode_jacobi(
                self.transformer,
                self.template,
                prompts,
                seeds=seeds,
                sampling=sampling,
                unconditional=unconditional,
                known=[[code for code in row if code != TO_SAMPLE] for row in known_BT.tolist()],
                on_step=on_step,
            ).rows
        else:
            rows = decode(
                self.transformer,
                self.template,
                prompts,
                seeds=seeds,
                sampling=sampling,
                unconditional=unconditional,
                known=known_BT,
                on_known=scores.append,
                on_step=on_step,
            )
        losses = (-torch.cat(scores, 1).double().mean(1)).tolist() if scores else None
        return CompletedCodes(torch.tensor(rows).view(len(rows), *self.grid), losses)

    def tokenise(self, prompts: Sequence[str], sources: Tensor | None = None) -> list[list[int]]:
        """Token ids before the image; raises UserError as `codes` does."""
        texts = [{self._text: self.text.encode(prompt)} for prompt in prompts]
        if self._source is None:
            if sources is not None:
                raise UserError("images: this model makes images from texts alone; leave images out")
            return [self.template.prompt(text) for text in texts]
        if sources is None:
            raise UserError("this model makes images from images; task=generate images=DIR prompts=[TEXT] runs it")
        grids = sources.flatten(1).tolist()
        return [self.template.prompt({**text, self._source: g}) for text, g in zip(texts, grids, strict=True)]

    def images(self, codes: Tensor) -> list[Image.Image]:
        """RGB images of codes `(B, y, x)`."""
        return pil_images(decode_codes(codes, self.image_tokenizer, len(codes)))


def pil_images(images: Tensor) -> list[Image.Image]:
    """RGB images of float `(B, 3, Y, X)`, 0 … 1."""
    return [to_pil_image(image) for image in (images * 255).round().to(torch.uint8).cpu()]
