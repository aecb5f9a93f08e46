"""The toy world as a data set of pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from cogview_pl.data.samples import ImageSample
from cogview_pl.data.toy.captions import caption, check_language, check_styles
from cogview_pl.data.toy.draw import draw
from cogview_pl.data.toy.scene import OBJECT_PROBABILITIES, SPLITS, Scene, random_stream, sample_scene
from cogview_pl.errors import UserError

# A fourth number of entropy sets these streams apart from that of the scenes.
_TEXT_STREAM = 1
_STYLE_STREAM = 2


class ToyDataset(Dataset[ImageSample]):
    """`size` pictures of a split, drawn on the fly; sample i depends on the arguments and on i only.

    Images are uint8 `(3, resolution, resolution)`. Each sample has one of `styles`, chosen by its index,
    which the caption names if `style_in_caption`.

    Raises UserError for an argument that is out of range.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        resolution: int = 64,
        language: str = "zh",
        styles: Sequence[str] = ("flat",),
        style_in_caption: bool = False,
        object_probabilities: Sequence[float] = OBJECT_PROBABILITIES,
    ) -> None:
        check_language(language)
        check_styles(styles)
        if not styles:
            raise UserError("data.styles: found none; give at least one, such as flat")
        for name, value in (("size", size), ("resolution", resolution)):
            if value < 1:
                raise UserError(f"{name}: found {value}; use a positive integer")
        sample_scene(seed, split, 0, object_probabilities)  # refuses what it cannot sample from
        self.split = split
        self.size = size
        self.seed = seed
        self.resolution = resolution
        self.language = language
        self.styles = tuple(styles)
        self.style_in_caption = style_in_caption
        self.object_probabilities = tuple(object_probabilities)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> ImageSample:
        pixels = draw(self.scene(i), self.resolution, self.style(i))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return ImageSample(f"toy_{self.split}_{self.seed}_{i:08d}", image, self.text(i))

    def scene(self, i: int) -> Scene:
        """What is in picture i."""
        return sample_scene(self.seed, self.split, self._checked(i), self.object_probabilities)

    def style(self, i: int) -> str:
        """The style of picture i."""
        rng = random_stream(self.seed, SPLITS.index(self.split), self._checked(i), _STYLE_STREAM)
        return self.styles[int(rng.random() * len(self.styles))]

    def text(self, i: int) -> str:
        """The caption of picture i, without drawing it."""
        rng = random_stream(self.seed, SPLITS.index(self.split), self._checked(i), _TEXT_STREAM)
        return caption(self.scene(i), self.language, rng, self.style(i) if self.style_in_caption else None)

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"sample {i} of a toy data set of {self.size}")
        return i
