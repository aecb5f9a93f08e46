"""Data in the form of Chinese-CLIP: `SPLIT_imgs.tsv` with images in base64, `SPLIT_texts.jsonl` with captions."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from cogview_pl.data.captions import CaptionError, field_texts
from cogview_pl.data.decoding.decode import ImageError
from cogview_pl.data.image_folders.listed import Listed, Span
from cogview_pl.data.image_folders.listed_images import ListedImages
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.durable.read import MAX_IMAGE, bounded_lines, unreadable_named
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS

IMAGES = "_imgs.tsv"
TEXTS = "_texts.jsonl"

_MAX_BASE64 = MAX_IMAGE // 3 * 4
_LONGEST_ID = 2**10


def archives(files: Sequence[str]) -> list[str]:
    """The image files of this form among the files of a folder, those of the training split first."""
    found = [file for file in files if file.endswith(IMAGES)]
    return sorted(found, key=lambda file: (not file.rpartition("/")[2].startswith("train"), file))


def read_archive(root: Path, archive: str, with_captions: bool, progress: NewProgress = Silent) -> ListedImages:
    """The images of an archive with all their captions, in the order of the archive.

    Args:
        root: the folder.
        archive: `SPLIT_imgs.tsv`, relative to the root; each line is an id, a tab, and an image in base64.
        with_captions: whether to read `SPLIT_texts.jsonl`: `{"text": …, "image_ids": [ID, …]}` on each line.
        progress: shows how many images were found.

    Raises:
        UserError: a file cannot be read or is malformed.
    """
    captions: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    if with_captions:
        _read_texts(root / f"{archive.removesuffix(IMAGES)}{TEXTS}", captions, problems)
    found = ListedImages()
    with (
        unreadable_named(root / archive, "see to it"),
        (root / archive).open("rb") as stream,
        progress(f"index {archive}", None, "images") as bar,
    ):
        for key, span in _images(stream, root, archive):
            problem = "" if captions.get(key) else problems.get(key, "")
            found.append(Listed(key, tuple(captions.get(key, ())), problem=problem, span=span))
            bar.update()
    return found


def open_span(root: Path, span: Span) -> BinaryIO:
    """The bytes of an image in an archive.

    Raises:
        ImageError: it is too large, is no base64, or the file cannot be read.
    """
    if span.size > _MAX_BASE64:
        raise ImageError(f"has {span.size:,} bytes in base64, at most {_MAX_BASE64:,} are read")
    try:
        with (root / span.archive).open("rb") as stream:
            stream.seek(span.offset)
            data = stream.read(span.size)
        return io.BytesIO(base64.b64decode(data.strip().translate(_FROM_URL_SAFE), validate=True))
    except binascii.Error:
        raise ImageError("is not an image in base64") from None
    except OSError as error:
        raise ImageError(f"{span.archive} cannot be read ({error.strerror})") from None


_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def _images(stream: BinaryIO, root: Path, archive: str) -> Iterator[tuple[str, Span]]:
    """Id and place of each image."""
    number = offset = 0
    while line := stream.readline(_MAX_BASE64 + _LONGEST_ID):
        SIGNALS.check()
        number += 1
        key, tab, data = line.partition(b"\t")
        if line.strip():
            if not tab or len(key) > _LONGEST_ID:
                raise UserError(f"{root / archive}:{number} is no id, tab and image in base64; mend the file")
            place = Span(archive, offset + len(key) + 1, len(data))
            yield key.decode("utf-8", "surrogateescape").strip(), place
        offset += len(line)


def _read_texts(file: Path, captions: dict[str, list[str]], problems: dict[str, str]) -> None:
    """Collect captions by the id of their image, and problems."""
    with unreadable_named(file, "see to it"), file.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        for number, line in enumerate(bounded_lines(stream, file), 1):
            SIGNALS.check()
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                keys = [str(key) for key in record["image_ids"]]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise UserError(
                    f'{file}:{number} is no text with images; write {{"text": …, "image_ids": [ID, …]}}'
                ) from None
            try:
                texts = field_texts(record.get("text"))
            except CaptionError as error:
                problems.update(dict.fromkeys(keys, f"{file}:{number}: {error}"))
                continue
            for key in keys:
                captions.setdefault(key, []).extend(texts)
