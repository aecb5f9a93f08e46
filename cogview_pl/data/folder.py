"""Image folders as a data set. How captions are found is in `image_folders/layout.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cogview_pl.data.captions import CaptionError
from cogview_pl.data.config import Captions, Decoding
from cogview_pl.data.decoding.decode import ImageError
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.image_folders.chinese_clip import open_span
from cogview_pl.data.image_folders.layout import FolderContent, read_folder
from cogview_pl.data.image_folders.listed import Fields, Listed
from cogview_pl.data.image_folders.listed_images import ListedImages
from cogview_pl.data.images import ImageFileDataset, split_fractions
from cogview_pl.data.packed import packed
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.data.samples import fractions_of
from cogview_pl.durable.read import UnreadableError, require_file
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION


class _Folder(NamedTuple):
    """A folder, its style, and the samples of it: images by number, each with one of its captions."""

    path: Path
    style: str
    images: ListedImages
    numbers: np.ndarray
    captions: np.ndarray


class _Sample(NamedTuple):
    """A listed image with one of its captions."""

    key: str
    folder: Path
    image: Listed
    caption: str
    style: str

    @property
    def image_file(self) -> Path:
        """The file with the image."""
        span = self.image.span
        return self.folder / (self.image.file if span is None else span.archive)


class FolderDataset(ImageFileDataset):
    """An image folder, or one folder per style; `docs/data.md` has the layouts.

    The key of a sample is its file, relative to its folder. With one folder per style, the name of the style comes
    first: `油画/a.png`. Samples that share an image share its key, and their side of the split.

    Args:
        root: the folder; None where `styles` names the folders, or `listing` a file in the folder.
        split: `train` or `val`, by a hash of the file in each folder (`split_fractions`).
        image_size: edge of the square images.
        val_fraction: share of `val`, 0 … 1.
        caption_field: field or column with the caption; None takes `text` or `caption`.
        listing: file with images and captions; None looks for one in the folder.
        image_field: field or column with the file of an image; None takes `file_name`, `image` or `path`.
        styles: the folder of each style.
        style_field: field or column with the style, instead of `styles`.
        style_patterns, min_size, text_fields, decoding, captions, caption_seed: see `ImageFileDataset`.
        progress: shows how many files were found and read.

    Raises:
        UserError: see `read_folder`, `split_fractions` and `ImageFileDataset`; neither or both of `root` and
            `styles` are given, or there are patterns but no styles.
    """

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        image_size: int,
        val_fraction: float,
        caption_field: str | None = None,
        *,
        listing: str | None = None,
        image_field: str | None = None,
        styles: Mapping[str, str | Path] | None = None,
        style_field: str | None = None,
        style_patterns: Sequence[str] = (),
        min_size: int = 0,
        text_fields: Sequence[str] = (CAPTION,),
        decoding: Decoding | None = None,
        captions: Captions | str = Captions.first,
        caption_seed: int = 0,
        progress: NewProgress = Silent,
    ) -> None:
        super().__init__(image_size, min_size, style_patterns, text_fields, decoding, captions, caption_seed)
        if styles and style_field is not None:
            raise UserError(f"data.style_field={style_field}: data.styles names the styles already; drop one of them")
        if style_patterns and not styles and style_field is None:
            raise UserError(
                "data.style_patterns: the images have no styles; set data.styles to one folder per style, "
                "or data.style_field to the field with the style"
            )
        fields = Fields(self.text_fields, image_field, caption_field, style_field if self.text_fields else None)
        self._parts: list[_Folder] = []
        self._notes: list[str] = []
        for style, folder in folders(root, styles, listing).items():
            name = f"data.styles.{style}" if style else "data.root"
            found = read_folder(folder, fields, listing, name, progress)
            self._notes += [*found.notes, *self._several_captions(found, f"{name}={folder}")]
            files = found.images.files.encoded
            fractions = fractions_of(files[number] for number in range(len(files)))
            self._add(folder, style, found.images, split_fractions(fractions, split, val_fraction))
        self._ends = np.cumsum([len(part.numbers) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        part, number, _ = self._place(index)
        return _key(part.style, part.images.files[number])

    def notes(self) -> list[str]:
        return self._notes

    def fingerprint(self) -> str:
        found = Fingerprint("folder")
        found.add(*self._settings())
        for sample in map(self._sample, range(len(self))):
            SIGNALS.check()
            texts = sample.image.texts(self.text_fields, sample.caption)
            problem = [sample.image.problem] if sample.image.problem else []
            found.add_file(sample.image_file, sample.key, texts, sample.style, *problem)
        return found.hexdigest()

    def _add(self, folder: Path, style: str, images: ListedImages, chosen: np.ndarray) -> None:
        """Add the samples of chosen images: one of each, or one for each of its captions."""
        if 2 * len(chosen) < len(images):  # else the few of a validation split would keep all others in memory
            images = ListedImages(map(images.__getitem__, chosen))
            chosen = packed(np.arange(len(images)))
        counts = images.num_captions()[chosen]
        numbers, captions = chosen, np.zeros(len(chosen), np.uint8)
        if self.choice.captions != Captions.first:
            pairs = zip(chosen.tolist(), counts.tolist(), strict=True)
            each = [self.choice.numbers(count, _key(style, images.files[number])) for number, count in pairs]
            numbers = np.repeat(chosen, list(map(len, each)))
            captions = packed(np.fromiter(chain.from_iterable(each), np.int64))
        self._parts.append(_Folder(folder, style, images, numbers, captions))

    def _place(self, index: int) -> tuple[_Folder, int, int]:
        """Folder of a sample, number of its image there, and number of its caption."""
        index = range(len(self))[index]
        at = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[at]
        inside = index - int(self._ends[at]) + len(part.numbers)
        return part, int(part.numbers[inside]), int(part.captions[inside])

    def _sample(self, index: int) -> _Sample:
        part, number, caption = self._place(index)
        image = part.images[number]
        text = image.captions[caption] if image.captions else ""
        return _Sample(_key(part.style, image.file), part.path, image, text, part.style or image.style)

    def _several_captions(self, found: FolderContent, name: str) -> list[str]:
        counts = found.images.num_captions()
        several = counts[counts > 1]
        if not len(several):
            return []
        which = {
            Captions.first: "the first",
            Captions.random: "a random one",
            Captions.all: "each",
        }
        choice = self.choice.captions
        have = "image has" if len(several) == 1 else "images have"
        return [
            f"{name}: {len(several):,} {have} several captions, {int(several.sum()):,} "
            f"in all; {which[choice]} counts (data.captions={choice.value}; first, random or all)"
        ]

    def _given_texts(self, index: int, field: str) -> Sequence[str]:
        sample = self._usable(index)
        return [sample.caption if field == CAPTION else sample.image.others.get(field, "")]

    def _usable(self, index: int) -> _Sample:
        """A sample whose line of the list is no problem, or a CaptionError."""
        sample = self._sample(index)
        if sample.image.problem:
            raise CaptionError(sample.image.problem)
        return sample

    def _require_image(self, index: int) -> None:
        file = self._usable(index).image_file
        try:
            require_file(file)
        except UnreadableError as error:
            raise ImageError("file not found" if error.missing else str(error)) from None

    def _style(self, index: int) -> str:
        return self._sample(index).style

    def _image(self, index: int) -> Path | BinaryIO:
        sample = self._usable(index)
        return sample.image_file if sample.image.span is None else open_span(sample.folder, sample.image.span)


def _key(style: str, file: str) -> str:
    return f"{style}/{file}" if style else file


def folders(root: str | Path | None, styles: Mapping[str, str | Path] | None, listing: str | None) -> dict[str, Path]:
    """Folder by style; the style of `root` is empty."""
    if root is not None and styles:
        raise UserError(f"data.root={root} and data.styles are both given; drop one of them")
    if root is None and listing is not None and not styles:
        root = Path(os.path.expanduser(listing)).parent
    if root is None and not styles:
        raise UserError(
            "data.root has no value; set it to a folder of images with captions, or data.styles to one folder per style"
        )
    named = {"": root} if root is not None else styles
    if not isinstance(named, Mapping) or not all(isinstance(folder, (str, Path)) for folder in named.values()):
        raise UserError(f"data.styles={named}: give one folder per style, as in {{油画: DIR, 素描: DIR}}")
    return {str(style): Path(os.path.expanduser(folder)) for style, folder in named.items()}
