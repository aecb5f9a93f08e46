"""Captions of an image folder, and image folders as a data set.

A folder that cannot be read raises `UserError`; an image that cannot be read is skipped (`images.py`).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from cogview_pl.data.config import Decoding
from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.images import CaptionError, ImageFileDataset, field_text, find_images, split_indices
from cogview_pl.durable.read import (
    MAX_CAPTION,
    UnreadableError,
    bounded_lines,
    cannot_be_read,
    find,
    kind_of,
    read_file,
    require_file,
)
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.vocab.roles import CAPTION

CAPTION_FILES = (
    "metadata.jsonl",
    "captions.jsonl",
    "metadata.csv",
    "captions.csv",
    "metadata.tsv",
    "captions.tsv",
)
FILE_FIELDS = ("file_name", "image", "path")
CAPTION_FIELDS = ("text", "caption")


class Listed(NamedTuple):
    """An image of a folder: its file relative to the folder, its texts in the order of the fields, and its style."""

    file: str
    texts: tuple[str, ...]
    style: str = ""


class FolderDataset(ImageFileDataset):
    """An image folder, or one folder per style; see `find_captions` for the forms of captions.

    The key of a sample is its file, relative to its folder as the captions name it. With one folder per style, the
    name of the style comes first: `油画/a.png`.

    Args:
        root: the folder; None where `styles` names the folders.
        split: `train` or `val`, by a hash of the file in each folder (`split_indices`).
        image_size: edge of the square images.
        val_fraction: share of `val`, 0 … 1.
        caption_field: field or column with the caption; None takes `text` or `caption`.
        styles: the folder of each style.
        style_field: field or column with the style, instead of `styles`.
        style_patterns, min_size, text_fields, decoding: see `ImageFileDataset`.

    Raises:
        UserError: see `find_captions`, `split_indices` and `ImageFileDataset`; neither or both of `root` and
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
        styles: Mapping[str, str | Path] | None = None,
        style_field: str | None = None,
        style_patterns: Sequence[str] = (),
        min_size: int = 0,
        text_fields: Sequence[str] = (CAPTION,),
        decoding: Decoding | None = None,
    ) -> None:
        super().__init__(image_size, min_size, style_patterns, text_fields, decoding)
        folders = _folders(root, styles)
        if styles and style_field is not None:
            raise UserError(f"data.style_field={style_field}: data.styles names the styles already; drop one of them")
        if style_patterns and not styles and style_field is None:
            raise UserError(
                "data.style_patterns: the images have no styles; set data.styles to one folder per style, "
                "or data.style_field to the field with the style"
            )
        self._samples: list[tuple[str, Path, Listed]] = []  # key, folder, listed image
        for style, folder in folders.items():
            name = f"data.styles.{style}" if style else "data.root"
            field = style_field if self.text_fields else None
            listed = find_captions(folder, caption_field, field, name, self.text_fields)
            for i in split_indices([image.file for image in listed], split, val_fraction):
                image = listed[i]._replace(style=style or listed[i].style)
                key = f"{style}/{image.file}" if style else image.file
                self._samples.append((key, folder, image))

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index][0]

    def fingerprint(self) -> str:
        found = Fingerprint("folder")
        found.add(*self._settings())
        for index, (key, _, image) in enumerate(self._samples):
            SIGNALS.check()
            found.add_file(self._image(index), key, image.texts, image.style)
        return found.hexdigest()

    def _given_text(self, index: int, field: str) -> str:
        return self._samples[index][2].texts[self.text_fields.index(field)]

    def _style(self, index: int) -> str:
        return self._samples[index][2].style

    def _image(self, index: int) -> Path:
        _, folder, image = self._samples[index]
        return folder / image.file


def _folders(root: str | Path | None, styles: Mapping[str, str | Path] | None) -> dict[str, Path]:
    """Folder by style; the style of `root` is empty."""
    if root is not None and styles:
        raise UserError(f"data.root={root} and data.styles are both given; drop one of them")
    if root is None and not styles:
        raise UserError(
            "data.root has no value; set it to a folder of images with captions, or data.styles to one folder per style"
        )
    folders = {"": root} if root is not None else styles
    if not isinstance(folders, Mapping) or not all(isinstance(folder, (str, Path)) for folder in folders.values()):
        raise UserError(f"data.styles={folders}: give one folder per style, as in {{油画: DIR, 素描: DIR}}")
    return {str(style): Path(os.path.expanduser(folder)) for style, folder in folders.items()}


def find_captions(
    root: str | Path,
    caption_field: str | None = None,
    style_field: str | None = None,
    name: str = "data.root",
    text_fields: Sequence[str] = (CAPTION,),
) -> list[Listed]:
    """The images of a folder with their texts, and their styles where `style_field` is given.

    Captions are in the first of these files that exists: `metadata.jsonl`, `captions.jsonl`, then the same names as
    `.csv` and `.tsv` with a header. The file of an image is in `file_name`, `image` or `path`; the caption is in
    `caption_field` or, where that is None, in `text` or `caption` (of a list of captions the first counts); any other
    text is in the field of its name. Without such a file, each image has its caption in a `.txt` of the same name, at
    any depth. All files are UTF-8, with or without byte-order mark. `name` is the configuration key of `root`. With no
    `text_fields`, no captions are looked for, and a folder may lack them.

    Raises:
        UserError: the folder is missing or unreadable or has no captions; a line is malformed, too long or lacks a
            field; or none of the listed images can be read.
    """
    root = Path(os.path.expanduser(root))
    _require_folder(root, name)
    listing = _listing(root)
    if listing is None and not text_fields:
        return _images_alone(root, name)
    if listing is None:
        found = _captions_in_txt(root, name)
        if style_field is not None:
            raise UserError(
                f"data.style_field={style_field}: {name}={root} has its captions in .txt files, which have no fields; "
                "set data.styles to one folder per style"
            )
        if tuple(text_fields) != (CAPTION,):
            raise UserError(
                f"template.layout: {name}={root} has its captions in .txt files, which have no columns "
                f"{', '.join(text_fields)}; write a {CAPTION_FILES[0]}"
            )
        return found
    try:
        with listing.open(encoding="utf-8-sig", newline="") as stream:
            read = _json_lines if listing.suffix == ".jsonl" else _table_rows
            found = [
                _listed(record, where, text_fields, caption_field, style_field)
                for where, record in read(stream, listing)
            ]
    except UnicodeDecodeError:
        raise UserError(f"{listing} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{listing} {cannot_be_read(error)}; see to it") from None
    if not found:
        raise UserError(f"{listing} lists no images; give one per line, with the fields file_name and text")
    _require_one(found, root, listing, name)
    return found


def _require_folder(root: Path, name: str) -> None:
    try:
        found = find(root)
    except UnreadableError as error:
        raise UserError(f"{name}={root} {error}; set it to a folder of images with captions") from None
    if found is None or kind_of(found) != "a folder":
        state = "does not exist" if found is None else "is not a folder"
        raise UserError(f"{name}={root} {state}; set it to a folder of images with captions")


def _listing(root: Path) -> Path | None:
    """The file with the captions of a folder, if there is one."""
    for file in CAPTION_FILES:
        try:
            require_file(root / file)
        except UnreadableError as error:
            if not error.missing:
                raise UserError(f"{root / file} {error}; mend or remove it") from None
        else:
            return root / file
    return None


def _require_one(listed: list[Listed], root: Path, listing: Path, name: str) -> None:
    """Raises UserError if none of the listed images can be opened."""
    unreadable = ""
    for image in listed:
        SIGNALS.check()
        try:
            require_file(root / image.file)
        except UnreadableError as error:
            if not error.missing and not unreadable:
                unreadable = f"{root / image.file} {error}"
        else:
            return
    if unreadable:
        raise UserError(f"{listing}: none of the {len(listed)} listed images can be read; {unreadable}")
    raise UserError(
        f"{listing}: none of the {len(listed)} listed images exists, the first is {root / listed[0].file}; "
        f"give files relative to {name}"
    )


def _images_alone(root: Path, name: str) -> list[Listed]:
    found = [Listed(image.relative_to(root).as_posix(), ()) for image in find_images(root)]
    if not found:
        raise UserError(f"{name}={root} holds no images; set it to a folder of images")
    return found


def _captions_in_txt(root: Path, name: str) -> list[Listed]:
    found = []
    num_captions = 0
    for image in find_images(root):
        SIGNALS.check()
        caption = _note(image.with_suffix(".txt"))
        num_captions += caption is not None
        found.append(Listed(image.relative_to(root).as_posix(), (caption or "",)))
    if not num_captions:
        raise UserError(
            f"{name}={root} has no captions; add one of {', '.join(CAPTION_FILES)} with the fields "
            "file_name and text, or one .txt per image"
        )
    return found


def _note(file: Path) -> str | None:
    """The caption in a `.txt` file; None where there is no such file."""
    try:
        text = read_file(file, MAX_CAPTION).decode("utf-8-sig")
    except UnreadableError as error:
        if error.missing:
            return None
        raise UserError(f"{file} {error}; mend or remove it") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _json_lines(stream: TextIO, file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(bounded_lines(stream, file), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number} is not JSON ({error}); write one object per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}:{number} is not a JSON object; write one object per line")
        yield f"{file}:{number}", record


def _table_rows(stream: TextIO, file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.reader(bounded_lines(stream, file), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{file}:{reader.line_num} has {len(row)} columns, the header has {len(header)}; "
                    'put "…" around a caption that holds the separator'
                )
            yield f"{file}:{reader.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num} is malformed ({error}); mend its quotes") from None


def _listed(
    record: dict[str, object],
    where: str,
    text_fields: Sequence[str],
    caption_field: str | None,
    style_field: str | None,
) -> Listed:
    file = next((record[name] for name in FILE_FIELDS if name in record), None)
    if not isinstance(file, str) or not file:
        known = ", ".join(record) or "none"
        raise UserError(f"{where} names no image; use {' or '.join(FILE_FIELDS)} (fields here: {known})")
    captions = CAPTION_FIELDS if caption_field is None else (caption_field,)
    texts = tuple(
        _field(record, where, captions, "caption", "data.caption_field")
        if field == CAPTION
        else _field(record, where, (field,), field, "the slot in template.layout")
        for field in text_fields
    )
    style = "" if style_field is None else _field(record, where, (style_field,), "style", "data.style_field")
    return Listed(file, texts, style)


def _field(record: dict[str, object], where: str, names: tuple[str, ...], what: str, key: str) -> str:
    """The text in the first of the named fields that a record has; `key` is where the configuration names it."""
    name = next((name for name in names if name in record), None)
    if name is None:
        raise UserError(f"{where} has no field {' or '.join(names)}; set {key} to one of: {', '.join(record)}")
    try:
        return field_text(record[name], what)
    except CaptionError as error:
        raise UserError(f"{where}, {name}: {error}; mend the line or set {key}") from None
