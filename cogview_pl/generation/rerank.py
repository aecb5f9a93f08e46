"""Models that take up what the painter made: the captioner that ranks images, the upscaler that doubles them.

Shapes: B images, y x the grid of their codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cogview_pl.checkpoints.model_folder import ImageTokenizer, SequenceModel
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.generation.caption_loss import caption_losses
from cogview_pl.generation.decode import fill
from cogview_pl.generation.quantization import quantize
from cogview_pl.generation.sampling import Sampling
from cogview_pl.generation.super_resolution.upscale import magnify
from cogview_pl.generation.super_resolution.windows import windows
from cogview_pl.transformer.config import NormScope
from cogview_pl.vocab import CodeSlot, caption_slots, magnify_slots


def require_same_codes(painter: ImageTokenizer, other: SequenceModel, key: str) -> None:
    """Raises UserError naming `key` if another model's image codes mean something else than the painter's."""
    if painter.identity != other.image_tokenizer.identity:
        raise UserError(
            f"{key}: that model was trained with another image tokenizer than the one that paints; give one that was "
            "trained on the same tokenize run"
        )


class _Companion:
    """A sequence model with its text tokenizer, in place."""

    def __init__(self, loaded: SequenceModel, device: str, dtype: torch.dtype, weights: str | None) -> None:
        self.template = loaded.template
        self.text = loaded.text
        self.model = loaded.model.to(device, dtype)
        quantize(self.model, weights)


class Captioner(_Companion):
    """Scores how well texts fit images by caption loss (paper §3.3).

    Args:
        loaded: a model whose layout writes text about a image.
        device, dtype: where to move it, and the precision of its weights there.
        weights: how its blocks' matrices are held, see `quantize`.

    Raises:
        UserError: the layout is another one, or `weights` cannot be had.
    """

    def __init__(self, loaded: SequenceModel, device: str, dtype: torch.dtype, weights: str | None = None) -> None:
        caption_slots(loaded.template)
        super().__init__(loaded, device, dtype, weights)

    def losses(self, texts: Sequence[str], codes: Tensor, batch_size: int) -> list[float]:
        """Caption loss of each pair, in nats per text token.

        Raises:
            UserError: a text is longer than the model's text slot.
        """
        text_tokens = [self.text.encode(text) for text in texts]
        found: list[float] = []
        for start in range(0, len(text_tokens), batch_size):
            SIGNALS.check()
            part = slice(start, start + batch_size)
            found += caption_losses(self.model, self.template, text_tokens[part], codes[part]).tolist()
        return found

    def captions(
        self,
        codes: Tensor,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size: int,
    ) -> Iterator[str]:
        """A caption for each image `(B, y, x)`, in order."""
        image = caption_slots(self.template)[1]
        for start in range(0, len(codes), batch_size):
            part = slice(start, start + batch_size)
            prompts = [self.template.prompt({image: flat}) for flat in codes[part].flatten(1).tolist()]
            rows = fill(self.model, self.template, prompts, seeds=seeds[part], sampling=sampling)
            first = self.template.vocabulary.text_tokens.start
            yield from (self.text.decode([token - first for token in row]) for row in rows)


class Upscaler(_Companion):
    """Doubles the edge of images by super-resolution in sliding windows (paper §3.2).

    Args:
        loaded: a model whose layout has a grid and then one of twice its edge.
        device, dtype: where to move it, and the precision of its weights there.
        weights: how its blocks' matrices are held, see `quantize`.

    Raises:
        UserError: the layout is another one, or `weights` cannot be had.
    """

    def __init__(self, loaded: SequenceModel, device: str, dtype: torch.dtype, weights: str | None = None) -> None:
        magnify_slots(loaded.template)
        super().__init__(loaded, device, dtype, weights)

    @property
    def grid(self) -> tuple[int, int]:
        """`(y, x)` codes of the images that it takes."""
        assert isinstance(self.template.target, CodeSlot)
        return self.template.target.grid

    def double(
        self,
        texts: Sequence[str],
        codes: Tensor,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        batch_size: int,
        on_window: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Codes `(B, 2y, 2x)` of images twice as large; `on_window` is called `num_steps` times.

        Raises:
            UserError: the grid is not the model's, or a text is longer than its slot.
        """
        text_tokens = [self.text.encode(text) for text in texts]
        parts = self._batches(len(text_tokens), batch_size)
        return torch.cat(
            [
                magnify(
                    self.model,
                    self.template,
                    text_tokens[part],
                    codes[part],
                    seeds=seeds[part],
                    sampling=sampling,
                    on_window=on_window,
                )
                for part in parts
            ]
        )

    def num_steps(self, num_images: int, batch_size: int) -> int:
        """Windows that `double` fills, those of a batch counted once."""
        return len(self._batches(num_images, batch_size)) * len(windows(self.grid[0]))

    def _batches(self, num_images: int, batch_size: int) -> list[slice]:
        """One image at a time with `norm_scope=tensor`, as in the original."""
        step = 1 if self.model.norm_scope == NormScope.tensor else batch_size
        return [slice(start, start + step) for start in range(0, num_images, step)]
