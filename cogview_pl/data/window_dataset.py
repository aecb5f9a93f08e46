"""Pairs for super-resolution (paper §3.2): a window of an image's codes, and the same window at twice the size."""

from __future__ import annotations

from torch.utils.data import Dataset

from cogview_pl.data.sequence_dataset import fields_of_slots
from cogview_pl.data.token_store.rows import TokenRows, WithoutText
from cogview_pl.errors import UserError
from cogview_pl.generation.super_resolution.windows import ACROSS, window
from cogview_pl.vocab import CodeSlot, Sequence, Template, magnify_slots

_WINDOWS = ACROSS**2


class WindowDataset(Dataset[Sequence]):
    """Windows of images that a token store holds in both sizes, laid out by a template of super-resolution.

    Training gives the model what decoding gives it: half-overlapping windows of the codes of an image, not the codes of
    cropped images.


    Args:
        samples: a split of a token store with large codes.
        template: a layout with a text slot, a small grid, and the target grid of twice its edge.
        every: each image counts nine times, once for each of its windows; False: once, image i with window i modulo 9.

    Raises:
        UserError: the store holds no large codes, its grid is not that of the target slot, or is no multiple of 4.
    """

    def __init__(self, samples: TokenRows | WithoutText, template: Template, *, every: bool) -> None:
        text, small = magnify_slots(template)
        large = template.target
        assert isinstance(large, CodeSlot)
        layout = samples.layout
        if not layout.large:
            raise UserError(
                "data.token_store: the token store holds images in one size, super-resolution needs two; "
                "run task=tokenize token_store.large=true"
            )
        if layout.grid != large.grid:
            raise UserError(
                f"template.layout: slot {large.name} holds {large.grid[0]}x{large.grid[1]} codes, the token store has "
                f"{layout.grid[0]}x{layout.grid[1]}; choose the model that matches the image tokenizer"
            )
        self.samples = samples
        self.template = template
        self.every = every
        self._names = text, small, large.name
        self._field = fields_of_slots(template, layout.text_fields)[text]
        self._windows = [window(large.grid[0], *divmod(number, ACROSS)) for number in range(_WINDOWS)]

    def __len__(self) -> int:
        return len(self.samples) * (_WINDOWS if self.every else 1)

    def key(self, index: int) -> str:
        """Name of a sample in messages."""
        image, number = self._place(index)
        return f"{self.samples.key(image)}, window {number}"

    def _place(self, index: int) -> tuple[int, int]:
        """Image and window of a sample."""
        return divmod(index, _WINDOWS) if self.every else (index, index % _WINDOWS)

    def __getitem__(self, index: int) -> Sequence:
        image, number = self._place(index)
        source, target = self._windows[number]
        text_tokens, codes = self.samples[image]
        text, small, large = self._names
        return self.template.build(
            {
                text: text_tokens[self._field],
                small: codes[source].flatten().numpy(),
                large: self.samples.large(image)[target].flatten().numpy(),
            }
        )
