"""From prompts to images: the Python entry point and what `task=generate` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from cogview_pl.checkpoints.adapter_folder import load_adapted
from cogview_pl.checkpoints.model_folder import SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.generation.decode import fill
from cogview_pl.generation.sampling import Sampling
from cogview_pl.generation.speculative import fill_jacobi
from cogview_pl.transformer.config import NormScope
from cogview_pl.vocab import CodeSlot, is_text_to_image


class CogView:
    """A trained sequence model with its tokenizers.

    Args:
        loaded: both models, template and text tokenizer. Models stay in the mode that they are in: loaded ones in
            evaluation mode, one that is being trained is switched by its trainer.
        device: where to move them; None leaves them where they are.
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
                f"this model's layout, {self.template.layout}, is not a text, then a image; give a run of "
                "task=pretrain or task=style (a super-resolution model goes into upscale_with= or task=magnify)"
            )

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None, *, verify: bool = True) -> CogView:
        """Read a run, model or adapter folder, such as `outputs/pretrain/latest`; default device: the GPU if any.

        `verify` compares the files with their hashes; a damaged or incomplete folder raises UserError.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_adapted(path, verify=verify), device)

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of a image."""
        assert isinstance(self.template.target, CodeSlot)
        return self.template.target.grid

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        sampling: Sampling | None = None,
        batch_size: int = 16,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Images for one prompt, or a list of images for each of several prompts.

        The k-th image of a prompt is drawn with `seed + k` and does not depend on the other prompts.

        Raises:
            UserError: a prompt is longer than the model's text slot.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = sampling or Sampling()
        rows = list(self.images(several, num_images_per_prompt, seed=seed, sampling=sampling, batch_size=batch_size))
        images = [rows[i : i + num_images_per_prompt] for i in range(0, len(rows), num_images_per_prompt)]
        return images[0] if isinstance(prompts, str) else images

    def images(
        self,
        prompts: Sequence[str],
        num_images_per_prompt: int,
        *,
        seed: int,
        sampling: Sampling,
        batch_size: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> Iterator[Image.Image]:
        """All images in order, `num_images_per_prompt` per prompt, made `batch_size` at a time."""
        for codes in self.batches(
            prompts, num_images_per_prompt, seed=seed, sampling=sampling, batch_size=batch_size, on_step=on_step
        ):
            yield from (to_pil_image(image) for image in self.decode(codes))

    def batches(
        self,
        prompts: Sequence[str],
        num_images_per_prompt: int,
        *,
        seed: int,
        sampling: Sampling,
        batch_size: int,
        on_step: Callable[[], None] = lambda: None,
    ) -> Iterator[Tensor]:
        """Codes `(B, y, x)` of all images in order, at most `batch_size` at a time.

        With `norm_scope=tensor` a batch holds images of one prompt only, as in the original.
        """
        jobs = [(prompt, seed + k) for prompt in self.tokenise(prompts) for k in range(num_images_per_prompt)]
        length = num_images_per_prompt if self.transformer.norm_scope == NormScope.tensor else len(jobs)
        for group in (jobs[i : i + length] for i in range(0, len(jobs), length)):
            for start in range(0, len(group), batch_size):
                batch, seeds = zip(*group[start : start + batch_size], strict=True)
                yield self.codes(batch, seeds, sampling=sampling, on_step=on_step)

    def tokenise(self, prompts: Sequence[str]) -> list[list[int]]:
        """Prompt tokens up to the open slot; raises UserError where a text is too long for its slot."""
        return [self.template.prompt({"text": self.text.encode(prompt)}) for prompt in prompts]

    def codes(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        sampling: Sampling,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Codes `(B, y, x)`, on the CPU, for tokenised prompts, one seed each.

        Raises:
            UserError: guidance or `jacobi` with `norm_scope="tensor"`.
        """
        arguments: dict[str, Any] = {
            "seeds": seeds,
            "sampling": sampling,
            "unconditional": [self.template.prompt({"text": []})] * len(prompts) if sampling.guided else None,
            "on_step": on_step,
        }
        if sampling.algorithm == "jacobi":
            rows = fill_jacobi(self.transformer, self.template, prompts, **arguments).rows
        else:
            rows = fill(self.transformer, self.template, prompts, **arguments)
        return torch.tensor(rows).view(len(rows), *self.grid)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Images `(B, 3, Y, X)`, uint8 on the CPU, of codes `(B, y, x)`."""
        device = next(self.image_tokenizer.parameters()).device
        images = self.image_tokenizer.decode(codes.to(device)).clamp(0, 1)
        return (images * 255).round().to(torch.uint8).cpu()
