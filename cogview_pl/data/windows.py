"""Pairs for super-resolution (paper §3.2): a window of a picture's codes, and the same window at twice the size.

Shapes: g edge of the store's grid, w edge of a window (g / 2).
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from cogview_pl.data.rows import StoredRows, WithoutText
from cogview_pl.errors import UserError
from cogview_pl.vocab import CodeSlot, Sequence, Template, magnify_slots


class WindowDataset(Dataset[Sequence]):
    """Windows of pictures that a token store holds in both sizes, laid out by a template of super-resolution.

    The model sees at training what it is given when it magnifies: a w x w window of the codes of a picture, not the
    codes of a cropped picture.

    Args:
        samples: a split of a token store with large codes.
        template: a layout with a text slot, a small grid, and the target grid of twice its edge.
        every: each picture counts once for each of its (w + 1)² windows; False: once, picture i with window i.

    Raises:
        UserError: the store holds no large codes, or its grid is not that of the target slot.
    """

    def __init__(self, samples: StoredRows | WithoutText, template: Template, *, every: bool) -> None:
        text, small = magnify_slots(template)
        large = template.target
        assert isinstance(large, CodeSlot)
        layout = samples.layout
        if not layout.large:
            raise UserError(
                "data.store: the token store holds pictures in one size, super-resolution needs two; "
                "run task=tokenize store.large=true"
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
        self._edge = large.grid[0] // 2

    @property
    def num_windows(self) -> int:
        """Windows of a picture."""
        return (self._edge + 1) ** 2

    def __len__(self) -> int:
        return len(self.samples) * (self.num_windows if self.every else 1)

    def __getitem__(self, index: int) -> Sequence:
        picture, window = divmod(index, self.num_windows) if self.every else (index, index % self.num_windows)
        top, left = divmod(window, self._edge + 1)
        pieces, codes = self.samples[picture]
        text, small, large = self._names
        return self.template.build(
            {
                text: pieces,
                small: _window(codes, top, left, self._edge),
                large: _window(self.samples.large(picture), 2 * top, 2 * left, 2 * self._edge),
            }
        )


def _window(codes: torch.Tensor, top: int, left: int, edge: int) -> list[int]:
    found: list[int] = codes[top : top + edge, left : left + edge].flatten().tolist()
    return found
