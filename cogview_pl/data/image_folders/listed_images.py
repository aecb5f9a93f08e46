"""The images of a folder with their texts, in columns: a million as Python objects take 0.6 GB, in every worker."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import overload

import numpy as np

from cogview_pl.data.image_folders.listed import Listed, Span
from cogview_pl.data.packed import TextColumn, counts_of


class ListedImages(Sequence[Listed]):
    """Images of a folder, to which further ones can be added.

    Args:
        images: the first ones.
    """

    def __init__(self, images: Iterable[Listed] = ()) -> None:
        self.files = TextColumn()
        """The file of each image."""
        self._captions = TextColumn()
        self._caption_ends = array("q")  # number of the captions of all images up to each
        self._others: dict[str, TextColumn] = {}
        self._styles: list[str] = []
        self._style_numbers: dict[str, int] = {}
        self._style_of = array("I")
        self._problems: dict[int, str] = {}
        self._archives: dict[str, int] = {}  # numbers of archives
        self._spans = array("q")  # archive, offset and size of images without files of their own; as many zeros
        for image in images:
            self.append(image)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Listed: ...
    @overload
    def __getitem__(self, index: slice) -> list[Listed]: ...
    def __getitem__(self, index: int | slice) -> Listed | list[Listed]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        index = range(len(self))[index]
        captions = range(self._caption_ends[index - 1] if index else 0, self._caption_ends[index])
        return Listed(
            self.files[index],
            tuple(map(self._captions.__getitem__, captions)),
            {field: column[index] for field, column in self._others.items()},
            self._styles[self._style_of[index]],
            self._problems.get(index, ""),
            self._span(index),
        )

    def append(self, image: Listed) -> None:
        """Add an image."""
        index = len(self)
        self.files.append(image.file)
        for caption in image.captions:
            self._captions.append(caption)
        self._caption_ends.append(len(self._captions))
        for field in image.others.keys() - self._others.keys():
            self._others[field] = TextColumn()
            for _ in range(index):
                self._others[field].append("")
        for field, column in self._others.items():
            column.append(image.others.get(field, ""))
        if image.style not in self._style_numbers:
            self._style_numbers[image.style] = len(self._styles)
            self._styles.append(image.style)
        self._style_of.append(self._style_numbers[image.style])
        if image.problem:
            self._problems[index] = image.problem
        if image.span is not None or self._spans:
            self._add_span(index, image.span)

    def rename(self, name_of: Callable[[str], str]) -> None:
        """Give each image that has no problem another file."""
        renamed = TextColumn()
        for index in range(len(self)):
            file = self.files[index]
            renamed.append(file if index in self._problems else name_of(file))
        self.files = renamed

    def num_captions(self) -> np.ndarray:
        """int64, number of captions of each image."""
        return counts_of(np.frombuffer(self._caption_ends, np.int64)) if self else np.zeros(0, np.int64)

    def _add_span(self, index: int, span: Span | None) -> None:
        self._spans.extend([0] * (3 * index - len(self._spans)))
        if span is None:
            self._spans.extend([0, 0, 0])
        else:
            archive = self._archives.setdefault(span.archive, len(self._archives) + 1)
            self._spans.extend([archive, span.offset, span.size])

    def _span(self, index: int) -> Span | None:
        archive, offset, size = self._spans[3 * index : 3 * index + 3] or (0, 0, 0)
        return Span(list(self._archives)[archive - 1], offset, size) if archive else None
