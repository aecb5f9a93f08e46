"""Lists of images with captions in one file: JSON lines, JSON, CSV and TSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from cogview_pl.data.image_folders.coco import coco_records, is_coco
from cogview_pl.data.image_folders.listed import Fields, name_in
from cogview_pl.data.image_folders.listed_images import ListedImages
from cogview_pl.data.image_folders.tables import Table
from cogview_pl.data.image_folders.text_files import encoding_name, open_text
from cogview_pl.data.image_folders.walk import is_image_name
from cogview_pl.durable.read import UnreadableError, bounded_lines, cannot_be_read, require_file
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS

TABLES = (".csv", ".tsv", ".txt")
"""Extensions of tables; other lists are JSON."""
_MAX_JSON = 2**30
"""Largest JSON file in bytes: it is read at once."""

Record = tuple[str, Mapping[str, object], str]
"""File and line, the fields, and a problem of the line, maybe empty."""


@dataclass
class Listing:
    """What a list says."""

    file: Path
    texts: ListedImages = field(default_factory=ListedImages)
    first: Mapping[str, object] = field(default_factory=dict)
    """The first record."""
    caption: str = ""
    """Name of the field with the caption."""
    how: str = ""
    """What is unusual about the file, for a note."""


def read_listing(file: Path, fields: Fields) -> Listing:
    """Read a list.

    Raises:
        UserError: the file cannot be read, lists no images, or a line is malformed or too long.
    """
    found = Listing(file)
    try:
        with open_text(file) as (stream, encoding):
            records, how = _records(stream, file, fields)
            for where, record, problem in records:
                SIGNALS.check()
                if not found.texts:
                    found.first = record
                    found.caption = name_in(record, fields.captions) or ""
                found.texts.append(fields.read(record, where, problem))
            found.how = ", ".join(filter(None, (encoding_name(encoding), how())))
    except UnicodeDecodeError:
        raise UserError(f"{file} has bytes that are no text in its encoding; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} {cannot_be_read(error)}; see to it") from None
    except UnreadableError as error:
        raise UserError(f"{file} {error}; write one object per line in a .jsonl file") from None
    if not found.texts:
        raise UserError(f"{file} lists no images; give one per line, with the fields file_name and text")
    return found


def _records(stream: TextIO, file: Path, fields: Fields) -> tuple[Iterator[Record], Callable[[], str]]:
    """The records of a list, and a function that says what was unusual once they are read."""
    if file.suffix.lower() in TABLES:
        table = Table(stream, file, fields.known())
        return ((f"{file}:{row.number}", row.cells, row.problem) for row in table), table.how
    if file.suffix.lower() == ".json" or _begins_a_list(stream):
        return _json(stream, file, fields), lambda: ""
    return _json_lines(stream, file), lambda: ""


def _begins_a_list(stream: TextIO) -> bool:
    """Whether a file of JSON lines is one JSON list of objects."""
    start = stream.read(2**10).removeprefix("\ufeff").lstrip()
    stream.seek(0)
    return start.startswith("[") and start[1:].lstrip().startswith("{")


def _json(stream: TextIO, file: Path, fields: Fields) -> Iterator[Record]:
    require_file(file, _MAX_JSON)
    try:
        tree = json.loads(stream.read().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); write a list of objects, or one object per line") from None
    if is_coco(tree):
        tree = coco_records(tree, file, fields)
    elif isinstance(tree, dict) and any(map(is_image_name, tree)):
        tree = [{fields.files[0]: name, fields.captions[0]: texts} for name, texts in tree.items()]
    if not isinstance(tree, list):
        raise UserError(f"{file} is no list of images; write a list of objects with the fields file_name and text")
    for number, record in enumerate(tree, 1):
        if not isinstance(record, dict):
            raise UserError(f"{file}, entry {number} is not a JSON object; write one object per image")
        yield f"{file}, entry {number}", record, ""


def _json_lines(stream: TextIO, file: Path) -> Iterator[Record]:
    for number, line in enumerate(bounded_lines(stream, file), 1):
        line = line.removeprefix("\ufeff") if number == 1 else line
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number} is not JSON ({error}); write one object per line") from None
        if not isinstance(record, dict):
            raise UserError(f"{file}:{number} is not a JSON object; write one object per line")
        yield f"{file}:{number}", record, ""
