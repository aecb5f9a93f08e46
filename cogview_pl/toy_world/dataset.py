"""The toy world as a data set of images and captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.samples import ImageSample
from cogview_pl.data.styles import StylePatterns
from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import caption, check_language, check_styles, style_name
from cogview_pl.toy_world.render import draw
from cogview_pl.toy_world.scene import (
    OBJECT_PROBABILITIES,
    SPLITS,
    Scene,
    random_stream,
    sample_scene,
    styles_held_out,
)

# A fourth number of entropy sets these streams apart from that of the scenes.
_TEXT_STREAM = 1
_STYLE_STREAM = 2


class ToyDataset(Dataset[ImageSample]):
    """`size` images of a split, drawn on the fly; sample i depends on the arguments and on i only.

    Images are uint8 `(3, resolution, resolution)`. Each sample has one of `styles`, drawn at random, and named in the
    caption by one of `style_patterns` if there are any.

    With patterns and two different styles or more, combinations of colour, shape and style are held out: no object of
    split "train" is drawn in the style that its pair is kept from (`styles_held_out`), and the first object of each
    scene of split "val" is drawn in just that one. Where the objects of a training scene leave no style, it is redrawn
    with as many objects; that happens only where there are no more styles than objects.

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
        style_patterns: Sequence[str] = (),
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
        self._patterns = StylePatterns(style_patterns)
        self._held_out = styles_held_out(styles) if style_patterns and len(set(styles)) > 1 else {}
        self.object_probabilities = tuple(object_probabilities)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> ImageSample:
        pixels = draw(self.scene(i), self.resolution, self.style(i))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return ImageSample(self.key(i), image, self.text(i))

    def key(self, i: int) -> str:
        """The name of image i."""
        return f"toy_{self.split}_{self.seed}_{i:08d}"

    def fingerprint(self) -> str:
        """A digest of the settings, of which samples are made."""
        found = Fingerprint("toy")
        found.add(self.split, self.size, self.seed, self.resolution, self.language, self.styles)
        found.add(self._patterns.patterns, self.object_probabilities)
        return found.hexdigest()

    def scene(self, i: int) -> Scene:
        """What is in image i."""
        scene = sample_scene(self.seed, self.split, self._checked(i), self.object_probabilities)
        just_as_many = [0.0] * (len(scene.objects) - 1) + [1.0]
        redraw = 0
        while not self._styles_for(scene):
            redraw += 1
            scene = sample_scene(self.seed, self.split, i, just_as_many, redraw)
        return scene

    def style(self, i: int) -> str:
        """The style of image i."""
        rng = random_stream(self.seed, SPLITS.index(self.split), self._checked(i), _STYLE_STREAM)
        styles = self._styles_for(self.scene(i))
        return styles[int(rng.random() * len(styles))]

    def text(self, i: int) -> str:
        """The caption of image i, without drawing it."""
        rng = random_stream(self.seed, SPLITS.index(self.split), self._checked(i), _TEXT_STREAM)
        text = caption(self.scene(i), self.language, rng)
        if not self._patterns:
            return text
        return self._patterns.apply(text, style_name(self.style(i), self.language), self.key(i))

    def _styles_for(self, scene: Scene) -> tuple[str, ...]:
        """The styles that a scene may be drawn in."""
        if not self._held_out:
            return self.styles
        held_out = [self._held_out[thing.colour, thing.shape] for thing in scene.objects]
        if self.split == "val":
            return (held_out[0],)
        return tuple(style for style in self.styles if style not in held_out)

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.size:
            raise IndexError(f"sample {i} of a toy data set of {self.size}")
        return i
