"""Image files with captions: the split, and the base class of folders and shards.

One bad image raises nothing here: the data set returns a `Skipped` with the reason, and `bad_samples.py` decides when
there are too many.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cogview_pl.data.captions import CaptionChoice, CaptionError
from cogview_pl.data.config import Captions, Decoding
from cogview_pl.data.decoding.decode import SampleError, decode_image
from cogview_pl.data.packed import packed
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped, fractions_of
from cogview_pl.data.styles import StylePatterns
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION

OTHER_TEXT = "template.layout slot or data.pair_field"
"""What names a text besides the caption, for messages."""


def split_indices(keys: Iterable[str], split: str, val_fraction: float) -> np.ndarray:
    """Indices of the samples of one split, in order, in the smallest type that holds them.

    The split of a key depends on the key alone (SHA-1), so it stays the same when other samples are added or removed.
    If the fraction is strictly between 0 and 1 and there are two different keys or more, neither split is empty.

    Args:
        keys: one per sample; equal keys are in the same split.
        split: `train` or `val`.
        val_fraction: expected share of `val`, 0 … 1.

    Raises:
        UserError: the fraction is out of range.
    """
    return split_fractions(fractions_of(key.encode("utf-8", "surrogatepass") for key in keys), split, val_fraction)


def split_fractions(fractions: np.ndarray, split: str, val_fraction: float) -> np.ndarray:
    """`split_indices` of keys with these `fractions_of`."""
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, not {split!r}")
    if not 0 <= val_fraction <= 1:
        raise UserError(f"data.val_fraction={val_fraction} must be between 0 and 1")
    is_val = fractions < val_fraction
    if 0 < val_fraction < 1 and len(fractions) > 0 and (least := fractions.min()) < (largest := fractions.max()):
        is_val |= fractions == least
        is_val &= fractions != largest
    return packed(np.flatnonzero(is_val == (split == "val")))


class ImageFileDataset(CaptionedImages):
    """Images in files with texts, by index: what folders and shards have in common.

    `dataset[i]` is an `ImageSample` with an image uint8 `(3, image_size, image_size)`, or a `Skipped`.

    Args:
        image_size: edge of the square images.
        min_size: images whose shorter edge has fewer pixels are skipped.
        style_patterns: how captions name the style (`StylePatterns`); without any, captions stay as they are.
        text_fields: names of the texts of a sample; `text` is the caption, any other a column or key of that name.
            Without any, samples are images alone, and neither captions nor styles are read.
        decoding: how images are decoded; None: the defaults.
        captions: which of several captions of an image count: `first`, `random` (by a hash of seed and key) or `all`,
            each as a sample of its own. Of several other texts the first counts.
        caption_seed: of the random choice.

    Raises:
        UserError: a pattern is unusable.
    """

    def __init__(
        self,
        image_size: int,
        min_size: int,
        style_patterns: Sequence[str],
        text_fields: Sequence[str],
        decoding: Decoding | None = None,
        captions: Captions | str = Captions.first,
        caption_seed: int = 0,
    ) -> None:
        self.choice = CaptionChoice(captions, caption_seed)
        self._caption_numbers: np.ndarray | None = None
        self.image_size = image_size
        self.min_size = min_size
        self.text_fields = tuple(text_fields)
        self.decoding = decoding or Decoding()
        self._patterns = StylePatterns(style_patterns if text_fields else ())
        if self._patterns and CAPTION not in text_fields:
            raise UserError("data.style_patterns: they name the style in {text}, a slot that template.layout lacks")

    @abstractmethod
    def key(self, index: int) -> str:
        """The name of a sample within the data set."""

    @abstractmethod
    def _given_texts(self, index: int, field: str) -> Sequence[str]:
        """The texts of a field as the data give them, maybe none, or a SampleError."""

    def _caption_number(self, index: int) -> int:
        """Which of its captions a sample takes, from 0, where each caption is a sample (`captions=all`)."""
        return 0 if self._caption_numbers is None else int(self._caption_numbers[index])

    def _take_each_caption(self, choose: Callable[[np.ndarray], None]) -> None:
        """Make a sample of each caption, if that is wanted; reads all captions.

        Args:
            choose: makes samples with the given indices the only ones; indices repeat.
        """
        if self.choice.captions != Captions.all or CAPTION not in self.text_fields:
            return
        counts = np.array([self._count_captions(index) for index in range(len(self))], dtype=np.int64)
        choose(np.repeat(np.arange(len(counts)), counts))
        self._caption_numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)

    def _count_captions(self, index: int) -> int:
        """Number of samples with the image of a sample; one where no caption can be read."""
        SIGNALS.check()
        try:
            return max(1, len(self._given_texts(index, CAPTION)))
        except SampleError:
            return 1

    @abstractmethod
    def _style(self, index: int) -> str:
        """The name of the style, maybe empty, or a SampleError."""

    def style(self, index: int) -> str:
        """The name of the style; empty where it has none or cannot be read."""
        try:
            return self._style(index)
        except SampleError:
            return ""

    @abstractmethod
    def _image(self, index: int) -> Path | BinaryIO:
        """The file to read the image from, or a SampleError."""

    def _require_image(self, index: int) -> None:
        """Raises SampleError if the file of an image is known to be missing."""

    def _settings(self) -> tuple[object, ...]:
        """The arguments that change a sample."""
        return (
            self.image_size,
            self.min_size,
            self._patterns.patterns,
            self.text_fields,
            *self.decoding.changes(),
            *self.choice.settings(),
        )

    def text(self, index: int, field: str = CAPTION) -> str:
        """The text of a field; empty where the sample lacks it. With patterns, the caption names its style."""
        try:
            return self._text(index, field)
        except SampleError:
            return ""

    def __getitem__(self, index: int) -> ImageSample | Skipped:
        return self.view(range(len(self))[index])

    def view(self, index: int, number: int = 0) -> ImageSample | Skipped:
        """A view of an image: random crops and flips follow from the key of the image and the number of the view."""
        try:
            texts = {field: self._text(index, field) for field in self.text_fields}
            image = decode_image(
                self._image(index), self.image_size, self.min_size, self.decoding, f"{self.key(index)} {number}"
            )
            return ImageSample(self.key(index), image.pixels, texts.pop(CAPTION, ""), texts, image.remark)
        except SampleError as error:
            return Skipped(self.key(index), str(error))

    def known_bad(self) -> Iterator[Skipped]:
        for index in range(len(self)):
            SIGNALS.check()
            try:
                self._require_image(index)
                for field in self.text_fields:
                    self._text(index, field)
            except SampleError as error:
                yield Skipped(self.key(index), str(error))

    def _text(self, index: int, field: str) -> str:
        """The complete text of a field, or a SampleError."""
        texts = self._given_texts(index, field)
        if field == CAPTION:
            text = self.choice.of(texts, self.key(index))[self._caption_number(index)]
        else:
            text = next(iter(texts), "")
        if not text:
            raise CaptionError(f"the {'caption' if field == CAPTION else field} is empty")
        if field != CAPTION or not self._patterns:
            return text
        style = self._style(index)
        if not style:
            raise CaptionError("the style is empty")
        return self._patterns.apply(text, style, self.key(index))
