"""Pairs of images that show the same in two styles: the source and the target of style transfer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from cogview_pl.data.decoding.formats import IMAGE_EXTENSIONS
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.images import ImageFileDataset, split_indices
from cogview_pl.data.packed import packed
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.data.styles import StylePatterns
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION

SOURCE = "source"
"""Name of the image slot that takes the source of a pair."""
NO_INSTRUCTIONS = (
    "data.style_patterns is empty, and captions of pairs name the style to make; set it to [{style}风格] or the like"
)


def instructions(patterns: Sequence[str]) -> StylePatterns:
    """Texts that name the style to make: patterns with the hole `{style}` alone."""
    return StylePatterns(patterns, holes=("style",))


class PairedImages(CaptionedImages):
    """Each image as the target of each other style, with an image of that style as its source.

    Two images are a pair if they agree in `field`, or in the names of their files, and have different styles. Where
    several images of a style agree, the n-th target takes the n-th of them, and begins again after the last. The text
    of a pair is an instruction that names the style of the target.

    Args:
        images: the images; their text fields have `field` and `style_field`.
        field: the text that images of a pair share; None: the name of the file without folder and extension.
        style_field: the text that names the style; None: the folder of the image does (`ImageFileDataset.style`).
        patterns: instructions, with the hole `{style}`.
        split: `train` or `val` by a hash of what a pair shares, with the share `val_fraction` for `val`; None: all.
        val_fraction: see `split`.

    Raises:
        UserError: there is no pair, or a pattern is unusable.
    """

    def __init__(
        self,
        images: ImageFileDataset,
        field: str | None,
        style_field: str | None,
        patterns: Sequence[str],
        split: str | None = None,
        val_fraction: float = 0.0,
    ) -> None:
        if not patterns:
            raise UserError(NO_INSTRUCTIONS)
        self._images = images
        self._style_field = style_field
        self._field = field
        self._patterns = instructions(patterns)
        shared, styles = self._read()
        self._bad = [number for number in range(len(images)) if not (shared[number] and styles[number])]
        targets, sources = _pairs(shared, styles)
        if not targets:
            raise UserError(f"data.pair_field={field or 'null'}: {_why_none(shared, styles, field)}")
        self._alone = len(images) - len(self._bad) - len(set(targets))
        names = sorted(set(styles) - {""})
        self._names = names
        self._style_of_target = packed(np.array([names.index(styles[number]) for number in targets]))
        self._targets, self._sources = packed(np.array(targets)), packed(np.array(sources))
        if split is not None:
            chosen = split_indices((shared[number] for number in targets), split, val_fraction)
            self._targets, self._sources = self._targets[chosen], self._sources[chosen]
            self._style_of_target = self._style_of_target[chosen]
            self._bad = self._bad if split == "train" else []  # each is listed once

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        index = range(len(self))[index]
        target, source = self._images[int(self._targets[index])], self._images[int(self._sources[index])]
        for sample in (target, source):
            if isinstance(sample, Skipped):
                return Skipped(self.key(index), f"{sample.key}: {sample.reason}")
        assert isinstance(target, ImageSample) and isinstance(source, ImageSample)
        remark = ", ".join(sample.remark for sample in (target, source) if sample.remark)
        return ImageSample(self.key(index), target.image, self.text(index), {}, remark, {SOURCE: source.image})

    def key(self, index: int) -> str:
        return f"{self._images.key(int(self._targets[index]))} from {self._images.key(int(self._sources[index]))}"

    def text(self, index: int, field: str = CAPTION) -> str:
        """The instruction; raises UserError for another field."""
        if field != CAPTION:
            raise UserError(f"template.layout: pairs of images have no text for slot {field}, only their instruction")
        return self._patterns.apply("", self._names[self._style_of_target[index]], self.key(index))

    def known_bad(self) -> Iterator[Skipped]:
        needed = " or ".join((self._field or "file name", self._style_field or "style"))
        return (Skipped(self._images.key(number), f"it has no {needed}") for number in self._bad)

    def notes(self) -> list[str]:
        alone = f"; {self._alone:,} images have no partner in another style" if self._alone else ""
        shared = f"the same {self._field}" if self._field else "the same file name"
        return [*self._images.notes(), f"pairs are images with {shared} in two styles{alone}"]

    def fingerprint(self) -> str:
        found = Fingerprint("pairs")
        found.add(self._images.fingerprint(), self._field, self._style_field, self._patterns.patterns, len(self))
        return found.hexdigest()

    def _read(self) -> tuple[list[str], list[str]]:
        """What pairs share, and the style, of each image; empty where it cannot be read."""
        shared, styles = [], []
        for number in range(len(self._images)):
            SIGNALS.check()
            shared.append(self._images.text(number, self._field) if self._field else _name(self._images.key(number)))
            field = self._style_field
            styles.append(self._images.text(number, field) if field else self._images.style(number))
        return shared, styles


def _name(key: str) -> str:
    """Name of a file without folder and extension."""
    name = key.rpartition("/")[2]
    stem, _, extension = name.rpartition(".")
    return stem if extension.lower() in IMAGE_EXTENSIONS else name


def _pairs(shared: Sequence[str], styles: Sequence[str]) -> tuple[list[int], list[int]]:
    """Numbers of the targets and of their sources, in the order of the targets."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, (value, style) in enumerate(zip(shared, styles, strict=True)):
        if value and style:
            groups[value][style].append(number)
    targets, sources, seen = [], [], Counter[tuple[str, str]]()
    for number, (value, style) in enumerate(zip(shared, styles, strict=True)):
        if not (value and style):
            continue
        place = seen[value, style]
        seen[value, style] += 1
        for other, numbers in sorted(groups[value].items()):
            if other != style:
                targets.append(number)
                sources.append(numbers[place % len(numbers)])
    return targets, sources


def _why_none(shared: Sequence[str], styles: Sequence[str], field: str | None) -> str:
    names = sorted(set(styles) - {""})
    if not names:
        return "no image has a style; set data.styles to one folder per style, or data.style_field to the field with it"
    if len(names) == 1:
        return f"all images have the style {names[0]}, and a pair needs two; add the images of another style"
    first = [next(value for value, style in zip(shared, styles, strict=True) if style == name) for name in names[:2]]
    what = f"the same {field}" if field else "the same file name"
    return (
        f"no two images of {len(names)} styles have {what} ({names[0]} has {first[0]!r}, {names[1]} has {first[1]!r}); "
        "set it to a field that the images of a pair share"
    )
