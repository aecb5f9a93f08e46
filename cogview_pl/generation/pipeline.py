"""From prompts to images by one sequence model; `assembly/cogview.py` is the Python API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.codes import decode_codes
from cogview_pl.generation.config import Algorithm, Sampling
from cogview_pl.generation.decode import decode
from cogview_pl.generation.speculative import decode_jacobi
from cogview_pl.transformer.config import NormScope
from cogview_pl.vocab import CodeSlot, is_text_to_image


class ImageGenerator:
    """A trained sequence model with its tokenizers.

    Args:
        loaded: both models, template and text tokenizer. Their mode is not changed: loaded models are in evaluation
            mode, and a trainer switches the model that it trains.
        device: device to move both models to; None leaves them where they are.

    Raises:
        UserError: the layout is not a text, then an image.
    """

    def __init__(self, loaded: SequenceModel, device: torch.device | str | None = None) -> None:
        self.template = loaded.template
        self.text = loaded.text
        self.transformer = loaded.model
        self.image_tokenizer = loaded.image_tokenizer.model
        if device is not None:
            self.transformer.to(device)
            self.image_tokenizer.to(device)
        if not is_text_to_image(self.template):
            raise UserError(
                f"this model's layout, {self.template.layout}, is not a text, then an image; give a run of "
                "task=pretrain or task=style (a super-resolution model goes into upscale_with= or task=magnify)"
            )

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
        seed: int = 0,
        sampling: Sampling,
        on_codes: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Tensor]:
        """Codes `(B, y, x)`, int64 on the CPU, of all images in order, at most `sampling.batch_size` at a time.

        `on_codes` is called with the number of codes of each step of a batch, one for each image, for progress bars.
        With `norm_scope=tensor` a batch holds images of one prompt only, as in the original.

        Raises:
            UserError: guidance or `jacobi` with `norm_scope="tensor"`; a prompt is longer than the text slot.
        """
        jobs = [(prompt, seed + k) for prompt in self.tokenise(prompts) for k in range(num_images_per_prompt)]
        length = num_images_per_prompt if self.transformer.norm_scope == NormScope.tensor else len(jobs)
        without_text = self.template.prompt({"text": []})
        for group in (jobs[i : i + length] for i in range(0, len(jobs), length)):
            for start in range(0, len(group), sampling.batch_size):
                batch, seeds = zip(*group[start : start + sampling.batch_size], strict=True)
                arguments: dict[str, Any] = {
                    "seeds": seeds,
                    "sampling": sampling,
                    "unconditional": [without_text] * len(batch),
                    "on_step": partial(on_codes, len(batch)),
                }
                if sampling.algorithm == Algorithm.jacobi:
                    rows = decode_jacobi(self.transformer, self.template, batch, **arguments).rows
                else:
                    rows = decode(self.transformer, self.template, batch, **arguments)
                yield torch.tensor(rows).view(len(rows), *self.grid)

    def tokenise(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids before the image; raises UserError where a text is too long for its slot."""
        return [self.template.prompt({"text": self.text.encode(prompt)}) for prompt in prompts]

    def images(self, codes: Tensor) -> list[Image.Image]:
        """RGB images of codes `(B, y, x)`."""
        return pil_images(decode_codes(codes, self.image_tokenizer, len(codes)))


def pil_images(images: Tensor) -> list[Image.Image]:
    """RGB images of float `(B, 3, Y, X)`, 0 … 1."""
    return [to_pil_image(image) for image in (images * 255).round().to(torch.uint8).cpu()]
