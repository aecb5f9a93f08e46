"""Captions in a text file for each image: beside it, or in another folder under the same name."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cogview_pl.data.captions import CaptionError, caption_lines
from cogview_pl.data.image_folders.listed import Listed
from cogview_pl.data.image_folders.listed_images import ListedImages
from cogview_pl.data.image_folders.text_files import GB18030, encoding_of
from cogview_pl.data.packed import Bytes
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.durable.read import MAX_CAPTION, UnreadableError, read_file
from cogview_pl.errors.signals import SIGNALS

EXTENSIONS = (".txt", ".caption")
"""Extensions of caption files; the first kind that any image has counts for all."""


@dataclass
class CaptionFiles:
    """Captions of images from their text files."""

    texts: ListedImages = field(default_factory=ListedImages)
    num_gb18030: int = 0
    """Files in GB18030."""


def beside(images: Iterable[str], others: Iterable[str], extension: str) -> dict[str, str]:
    """The caption file of each image that has one of the same name, in any letter case of the extension."""
    stems = {}
    for file in others:
        stem, found = posixpath.splitext(file)
        if found.lower() == extension and (found == extension or stem not in stems):
            stems[stem] = file
    pairs = ((image, stems.get(posixpath.splitext(image)[0])) for image in images)
    return {image: file for image, file in pairs if file is not None}


def in_another_folder(images: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """The caption file of each image whose path is the same but for its first folder: `images/a.jpg`, `texts/a.txt`."""
    stems: dict[str, str | None] = {}
    for file in others:
        _folder, _, rest = file.partition("/")
        stem, extension = posixpath.splitext(rest)
        if rest and extension.lower() in EXTENSIONS:
            stems[stem] = file if stem not in stems else None
    pairs = ((image, stems.get(posixpath.splitext(image.partition("/")[2] or image)[0])) for image in images)
    return {image: file for image, file in pairs if file is not None}


def read_caption_files(
    root: Path, images: Collection[str], files: Mapping[str, str], progress: NewProgress = Silent
) -> CaptionFiles:
    """The captions of images: each line that is not empty is one.

    Files are UTF-8 or UTF-16. Where most of those beyond ASCII are GB18030 and no UTF-8, all such files are read as
    GB18030. A file that is not text is a problem of its image.

    Args:
        root: the folder.
        images: the images, relative to it.
        files: the caption file of each image that has one.
        progress: shows how many files were read.
    """
    contents, unreadable = Bytes(), {}
    with progress("read captions", len(files), "files") as bar:
        for image in images:
            SIGNALS.check()
            try:
                contents.append(read_file(root / files[image], MAX_CAPTION) if image in files else b"")
            except UnreadableError as error:
                contents.append(b"")
                unreadable[image] = error
            bar.update(image in files)
    gb18030 = _mostly_gb18030(contents)
    found = CaptionFiles()
    for number, image in enumerate(images):
        try:
            texts, encoding = _lines(unreadable.get(image, contents[number]), gb18030)
        except CaptionError as error:
            found.texts.append(Listed(image, problem=f"{files[image]} {error}"))
        else:
            found.num_gb18030 += encoding == GB18030
            found.texts.append(Listed(image, tuple(texts)))
    return found


def _mostly_gb18030(contents: Bytes) -> bool:
    """Whether most contents beyond ASCII are GB18030."""
    encodings = Counter(
        encoding_of(one) for one in map(contents.__getitem__, range(len(contents))) if not one.isascii()
    )
    return 2 * encodings[GB18030] > encodings.total()


def _lines(content: bytes | UnreadableError, gb18030: bool) -> tuple[list[str], str]:
    """The captions in a file, and its encoding; CaptionError if it is no text."""
    if isinstance(content, UnreadableError):
        raise CaptionError(f"{content}; mend or remove it")
    encoding = encoding_of(content)
    if encoding == GB18030 and not gb18030:
        raise CaptionError("is not UTF-8 text but GB18030, unlike most; save it as UTF-8")
    try:
        return caption_lines(content.decode(encoding)), encoding
    except UnicodeDecodeError:
        raise CaptionError("is not UTF-8 text; save it as UTF-8") from None
