"""The toy world as a data set of images and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.pairs import NO_INSTRUCTIONS, SOURCE, instructions
from cogview_pl.data.samples import CaptionedImages, ImageSample
from cogview_pl.data.styles import StylePatterns
from cogview_pl.errors import UserError
from cogview_pl.toy_world.captions import caption, check_language, check_styles, style_name
from cogview_pl.toy_world.config import Pairs
from cogview_pl.toy_world.edits import Edit, Shown, edit_to
from cogview_pl.toy_world.render import render
from cogview_pl.toy_world.scene import (
    OBJECT_PROBABILITIES,
    SPLITS,
    Scene,
    random_stream,
    sample_scene,
    styles_held_out,
)
from cogview_pl.vocab.roles import CAPTION

# The fourth number of the entropy separates these streams from the stream of the scenes.
_TEXT_STREAM = 1
_STYLE_STREAM = 2
_SOURCE_STREAM = 4  # 3 is that of scenes that are sampled again


class ToyDataset(CaptionedImages):
    """Images of one split, rendered when they are read; sample i depends on the arguments and on i only.

    Images are uint8 `(3, image_size, image_size)`. Each sample has one of `styles`, sampled at random, and one of
    `style_patterns`, if there are any, names it in the caption.

    With patterns and two different styles or more, combinations of colour, shape and style are held out: an object of
    split "train" never has the style that its colour and shape are kept from (`styles_held_out`), and the first object
    of each scene of split "val" always has it. Where the objects of a training scene leave no style, the scene is
    sampled again with the same number of objects; that happens only if there are no more styles than objects.

    Where the layout has a slot `source`, a sample is a pair, its image the target, and its text an instruction. `pairs`
    says what differs: the style, which `style_patterns` name with the hole `{style}` alone, or one attribute of one
    object (`edits.py`). The target is the image that the sample would be without a source.

    Args:
        split: `train` or `val`.
        image_size: edge of the images in pixels.
        train_size, val_size: number of images in the two splits.
        seed: of the scenes, 0 or larger.
        language: of the captions, "zh" or "en".
        styles: keys of `STYLES`, at least one.
        style_patterns: see `StylePatterns`.
        object_probabilities: weights of one, two and three objects.
        pairs: see above.
        image_fields: `source`, or none.
        cache_mb: pixels that each process keeps for later passes (10^6 bytes); with them a sample that was read before
            is not rendered again.

    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self,
        split: str,
        image_size: int,
        train_size: int,
        val_size: int,
        seed: int = 0,
        language: str = "zh",
        styles: Sequence[str] = ("flat",),
        style_patterns: Sequence[str] = (),
        object_probabilities: Sequence[float] = OBJECT_PROBABILITIES,
        cache_mb: float = 0,
        pairs: Pairs | str = Pairs.styles,
        image_fields: Sequence[str] = (),
    ) -> None:
        check_language(language)
        check_styles(styles)
        if not styles:
            raise UserError("data.styles: found none; give at least one, such as flat")
        for name, value in (("image_size", image_size), ("train_size", train_size), ("val_size", val_size)):
            if value < 1:
                raise UserError(f"data.{name}: found {value}; use a positive integer")
        sample_scene(seed, split, 0, object_probabilities)  # refuses what it cannot sample from
        self.split = split
        self.image_size = image_size
        self.seed = seed
        self.language = language
        self.styles = tuple(styles)
        self.object_probabilities = tuple(object_probabilities)
        self._size = train_size if split == "train" else val_size
        self._rendered: dict[int, Tensor] = {}
        self._most_rendered = int(cache_mb * 1e6 / (3 * image_size**2))
        self.pairs = Pairs(pairs) if image_fields else None
        if self.pairs is not None:
            _check_pairs(self.pairs, image_fields, styles, style_patterns)
        self._patterns = StylePatterns(style_patterns) if self.pairs is None else instructions(style_patterns)
        self._held_out = styles_held_out(styles) if style_patterns and len(set(styles)) > 1 else {}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> ImageSample:
        scene = self.scene(index)  # once: it costs as much as to render it in the plain style
        style = self._style_of(scene, index)
        image, text = self._image(scene, style, index), self._text_of(scene, style, index)
        if self.pairs is None:
            return ImageSample(self.key(index), image, text)
        source = _rendered(*self._source(scene, style, index), self.image_size)
        return ImageSample(self.key(index), image, text, images={SOURCE: source})

    def _image(self, scene: Scene, style: str, index: int) -> Tensor:
        image = self._rendered.get(index)
        if image is None:
            image = _rendered(scene, style, self.image_size)
            if len(self._rendered) < self._most_rendered:
                self._rendered[index] = image
        return image

    def key(self, index: int) -> str:
        """The name of an image."""
        return f"toy_{self.split}_{self.seed}_{index:08d}"

    def fingerprint(self) -> str:
        """A digest of the arguments, from which all samples follow."""
        found = Fingerprint("toy")
        found.add(self.split, self._size, self.seed, self.image_size, self.language, self.styles)
        found.add(self._patterns.patterns, self.object_probabilities)
        if self.pairs is not None:
            found.add(self.pairs.value)
        return found.hexdigest()

    def scene(self, index: int) -> Scene:
        """The scene that an image shows."""
        scene = sample_scene(self.seed, self.split, self._checked(index), self.object_probabilities)
        just_as_many = [0.0] * (len(scene.objects) - 1) + [1.0]
        redraw = 0
        while not self._styles_for(scene):
            redraw += 1
            scene = sample_scene(self.seed, self.split, index, just_as_many, redraw)
        return scene

    def style(self, index: int) -> str:
        """The style of an image."""
        return self._style_of(self.scene(index), index)

    def text(self, index: int, field: str = CAPTION) -> str:
        """The caption of an image, without rendering it; raises UserError for another field."""
        if field != CAPTION:
            raise UserError(f"template.layout: data=toy has no text for slot {field}; use data with such a column")
        scene = self.scene(index)
        return self._text_of(scene, self._style_of(scene, index), index)

    def _style_of(self, scene: Scene, index: int) -> str:
        styles = self._styles_for(scene)
        if len(styles) == 1:
            return styles[0]
        rng = random_stream(self.seed, SPLITS.index(self.split), index, _STYLE_STREAM)
        return styles[int(rng.random() * len(styles))]

    def _text_of(self, scene: Scene, style: str, index: int) -> str:
        if self.pairs == Pairs.edits:
            return self._edit(scene, index).text
        rng = random_stream(self.seed, SPLITS.index(self.split), index, _TEXT_STREAM)
        text = caption(scene, self.language, rng)
        if not self._patterns:
            return text
        return self._patterns.apply(text, style_name(style, self.language), self.key(index))

    def shown(self, index: int) -> Shown:
        """What the target of a pair shows."""
        scene = self.scene(index)
        changed = self._edit(scene, index).changed if self.pairs == Pairs.edits else None
        return Shown(tuple(thing.spec for thing in scene.objects), changed)

    def _source(self, scene: Scene, style: str, index: int) -> tuple[Scene, str]:
        """Scene and style of the source of a pair."""
        if self.pairs == Pairs.edits:
            return self._edit(scene, index).source, style
        others = [name for name in self.styles if name != style]
        return scene, others[int(self._random_source(index).random() * len(others))]

    def _edit(self, scene: Scene, index: int) -> Edit:
        return edit_to(scene, self.language, self._random_source(index))

    def _random_source(self, index: int) -> np.random.Generator:
        return random_stream(self.seed, SPLITS.index(self.split), index, _SOURCE_STREAM)

    def _styles_for(self, scene: Scene) -> tuple[str, ...]:
        """The styles that a scene may have."""
        if not self._held_out:
            return self.styles
        held_out = [self._held_out[thing.colour, thing.shape] for thing in scene.objects]
        if self.split == "val":
            return (held_out[0],)
        return tuple(style for style in self.styles if style not in held_out)

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of a toy data set of {self._size}")
        return index


def _rendered(scene: Scene, style: str, image_size: int) -> Tensor:
    """An image of a scene, uint8 `(3, image_size, image_size)`."""
    return torch.from_numpy(render(scene, image_size, style)).permute(2, 0, 1).contiguous()


def _check_pairs(
    pairs: Pairs, image_fields: Sequence[str], styles: Sequence[str], style_patterns: Sequence[str]
) -> None:
    """Raises UserError for pairs that cannot be made."""
    if tuple(image_fields) != (SOURCE,):
        raise UserError(
            f"template.layout: pairs have one further image, {SOURCE}, the layout has {', '.join(image_fields)}; name "
            f"the slot {{{SOURCE}:…}}"
        )
    if pairs == Pairs.edits:
        if style_patterns:
            raise UserError("data.style_patterns: the instructions of data.pairs=edits name no style; set it to []")
        return
    if not style_patterns:
        raise UserError(NO_INSTRUCTIONS)
    if len(set(styles)) < 2:
        raise UserError(
            f"data.styles={list(styles)}: a pair shows a scene in two styles; name another one, such as data.styles="
            "[flat,oil]"
        )
