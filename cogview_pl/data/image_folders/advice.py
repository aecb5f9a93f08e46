"""What to do with a folder that cannot be used: one message per kind of folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cogview_pl.data.image_folders.file_names import FileNames
from cogview_pl.data.image_folders.listed import CAPTION_FIELDS, FILE_FIELDS, Fields, name_in
from cogview_pl.data.image_folders.listings import read_listing
from cogview_pl.data.image_folders.walk import FolderFiles, is_image_name
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

_OTHER_READERS = {
    ".tar": "set data=webdataset data.urls='{root}/**/*.tar'",
    ".parquet": "set data=parquet data.urls='{root}/**/*.parquet'",
    ".zip": "unpack it",
    ".gz": "unpack it",
}
"""What to do with files that a folder of images does not hold, by extension."""
_LISTS = (".csv", ".tsv", ".jsonl", ".json")
_SHEETS = (".xlsx", ".xls", ".ods")
_ADDRESS = re.compile("https?://")
_KINDS_NAMED = 4


def for_a_file(file: Path) -> str:
    """What to do with a file that is given for a folder."""
    if file.suffix.lower() in _LISTS:
        return f"give the list as data.listing={file}"
    advice = _OTHER_READERS.get(file.suffix.lower(), "set it to a folder of images with captions")
    return advice.format(root=file.parent)


def no_images(root: Path, name: str, files: FolderFiles) -> str:
    """A message for a folder without images."""
    kinds = _kinds(files.others)
    for extension, advice in _OTHER_READERS.items():
        if extension in kinds:
            found = f"{kinds[extension]:,} {extension}"
            return f"{name}={root} holds no images but {found}; {advice.format(root=root)}"
    found = f" but {_said(kinds)}" if kinds else ""
    return f"{name}={root} holds no images{found}; set it to a folder of images"


def no_captions(root: Path, name: str, files: FolderFiles, listings: Sequence[str]) -> str:
    """A message for a folder whose captions are not found: it says what is there, and names the keys to set."""
    if not files.images:
        if any(extension in _kinds(files.others) for extension in _OTHER_READERS):
            return no_images(root, name, files)
        found = f", but {_said(_kinds(files.others))}" if files.others else ""
        return f"{name}={root} has no captions and no images{found}; set it to a folder of images with captions"
    images = _said(_kinds(files.images))
    lists = [file for file in files.others if file.lower().endswith(_LISTS)]
    for file in lists:
        columns = _first_record(root / file)
        if columns:
            image, caption = _guess(columns, FileNames(root, files.images))
            keys = f"data.listing={file}{_key('image_field', image, FILE_FIELDS)}"
            keys += _key("caption_field", caption, CAPTION_FIELDS)
            known = ", ".join(filter(None, columns))
            return f"{name}={root}: found {images}, and {file} with the columns {known}; set {keys}"
    sheets = [file for file in files.others if file.lower().endswith(_SHEETS)]
    if sheets:
        return f"{name}={root}: found {images}, and {sheets[0]}, a spreadsheet; save it as {listings[2]} (CSV UTF-8)"
    return (
        f"{name}={root} has no captions; add one of {', '.join(listings)} with the fields file_name and text, or one "
        f".txt per image (found {images}; task=vqvae needs no captions)"
    )


def with_columns(problem: str, file: Path, fields: Fields, names: FileNames, images: Sequence[str]) -> str:
    """The problem of the first line of a list, with keys to set where they can be told from its values."""
    record = _first_record(file)
    image, caption = _guess(record, names)
    addresses = [column for column, value in record.items() if isinstance(value, str) and _ADDRESS.match(value)]
    if addresses and not image:
        return f"{problem}; {addresses[0]} holds addresses: download the images, and name their files"
    wanted = []
    if image and name_in(record, fields.files) is None:
        wanted.append(f"data.image_field={image}")
    if caption and CAPTION in fields.texts and name_in(record, fields.captions) is None:
        wanted.append(f"data.caption_field={caption}")
    if not wanted or not images:
        return problem
    return f"{problem}; found {_said(_kinds(images))}: set {' '.join(wanted)}"


def _first_record(file: Path) -> Mapping[str, object]:
    """The first record of a list; empty where it cannot be read as one."""
    try:
        return read_listing(file, Fields(texts=())).first
    except UserError:
        return {}


def _guess(record: Mapping[str, object], names: FileNames) -> tuple[str, str]:
    """The columns with the image and with the caption, told by the values of a record; empty where there is none."""
    firsts = {column: value[0] if isinstance(value, list) and value else value for column, value in record.items()}
    texts = {column: text for column, text in firsts.items() if isinstance(text, str) and column and "://" not in text}
    image = next((column for column, value in texts.items() if is_image_name(value)), "")
    image = image or next((column for column, value in texts.items() if value and names.knows(value)), "")
    others = {column: value for column, value in texts.items() if column != image and not value.strip().isdigit()}
    return image, max(others, key=lambda column: len(others[column]), default="")


def _key(name: str, column: str, usual: Sequence[str]) -> str:
    return f" data.{name}={column}" if column and column.lower() not in usual else ""


def _kinds(files: Sequence[str]) -> Counter[str]:
    return Counter(os.path.splitext(file)[1].lower() or "without extension" for file in files)


def _said(kinds: Counter[str]) -> str:
    """Such as `2,000 .jpg and 3 .png`."""
    found = [f"{count:,} {kind}" for kind, count in kinds.most_common(_KINDS_NAMED)]
    rest = kinds.total() - sum(count for _, count in kinds.most_common(_KINDS_NAMED))
    found += [f"{rest:,} others"] if rest else []
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
