"""Tables of images and captions: CSV with `,` `;` `|` or tabs, with or without a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from cogview_pl.data.image_folders.walk import is_image_name
from cogview_pl.durable.read import MAX_CAPTION, bounded_lines
from cogview_pl.errors import UserError

_SEPARATORS = (",", "\t", ";", "|")
_NAMES = {"\t": "tab"}


class TableRow(NamedTuple):
    """A row of a table."""

    number: int
    """Line at which it ends, from 1."""
    cells: dict[str, str]
    """Cells by the names of their columns, as many as there are of both."""
    problem: str = ""
    """Why cells and columns may not fit."""


class Table:
    """The rows of a table, to be read once.

    Cells in quotes may hold separators and line feeds, but in a table with tabs quotes are ordinary characters, and
    only those around a whole cell are taken away. White space after a separator does not count, rows without text are
    passed over, and so are empty cells beyond the header. A first row that names an image is no header: the columns are
    then `file_name` and `text`.

    Args:
        stream: the text, opened with `newline=""`.
        file: its name, for messages; `.tsv` and `.txt` are expected to have tabs.
        known: names of columns by which the separator is told, in lower case.

    Raises:
        UserError: the table has no header and more than two columns; while it is read, quotes are malformed or a line
            is too long.
    """

    def __init__(self, stream: TextIO, file: Path, known: Sequence[str]) -> None:
        self._file = file
        lines = bounded_lines(stream, file)
        first = next(lines, "")
        usual = "\t" if file.suffix.lower() in (".tsv", ".txt") else ","
        self.separator = _separator(first, usual, known)
        if self.separator == "\t":
            self._rows = _plain_rows(first, lines)
        else:
            csv.field_size_limit(MAX_CAPTION)
            self._rows = _quoted_rows(first, lines, self.separator, file)
        self.header: list[str] = []
        self._first: tuple[int, list[str]] | None = None
        number, cells = next(self._rows, (0, []))
        self.has_header = not any(map(is_image_name, cells))
        if self.has_header:
            self.header = _without_empty_end([cell.strip() for cell in cells])
        else:
            self._first = (number, cells)
            self.header = self._headers_of(cells)

    def __iter__(self) -> Iterator[TableRow]:
        if self._first is not None:
            yield self._row(*self._first)
        for number, cells in self._rows:
            if any(cell.strip() for cell in cells):
                yield self._row(number, cells)

    def how(self) -> str:
        """What is unusual about the table, for a note; may be empty."""
        parts = [] if self.has_header else ["without a header: file, then caption"]
        usual = "\t" if self._file.suffix.lower() == ".tsv" else ","
        if self.separator != usual:
            parts.append(f"separator {_NAMES.get(self.separator, self.separator)}")
        return ", ".join(parts)

    def _row(self, number: int, cells: list[str]) -> TableRow:
        while len(cells) > len(self.header) and not cells[-1].strip():
            cells = cells[:-1]
        problem = ""
        if len(cells) != len(self.header):
            problem = (
                f"{self._file}:{number} has {len(cells)} columns, the header has {len(self.header)}; "
                'put "…" around a caption that holds the separator'
            )
        return TableRow(number, dict(zip(self.header, cells, strict=False)), problem)

    def _headers_of(self, cells: list[str]) -> list[str]:
        cells = _without_empty_end(cells)
        if len(cells) != 2:
            raise UserError(
                f"{self._file}:1 names an image, so that the file has no header, and has {len(cells)} columns; write a "
                "first line with the names of the columns"
            )
        return ["file_name", "text"] if is_image_name(cells[0]) else ["text", "file_name"]


def _separator(line: str, usual: str, known: Sequence[str]) -> str:
    """The separator with which the first line has a known column or the name of an image, else the likeliest."""
    order = (usual, *(sign for sign in _SEPARATORS if sign != usual))
    for sign in order:
        cells = [cell.strip().strip('"') for cell in line.split(sign)]
        if len(cells) > 1 and any(cell.lower() in known or is_image_name(cell) for cell in cells):
            return sign
    return max(order, key=line.count)


def _plain_rows(first: str, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(_chained(first, lines), 1):
        yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """A cell without quotes around it; quotes inside are doubled then."""
    inner = cell[1:-1]
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else cell


def _quoted_rows(first: str, lines: Iterator[str], separator: str, file: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_chained(first, lines), delimiter=separator, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num} is malformed ({error}); mend its quotes") from None


def _chained(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _without_empty_end(cells: list[str]) -> list[str]:
    while cells and not cells[-1].strip():
        cells = cells[:-1]
    return cells
