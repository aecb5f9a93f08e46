"""Tables with a column of images and columns of texts: what data sets of Parquet files and of `datasets` share."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cogview_pl.data.captions import field_text, field_texts
from cogview_pl.data.config import Captions, Decoding
from cogview_pl.data.decoding.decode import SampleError
from cogview_pl.data.images import OTHER_TEXT, ImageFileDataset
from cogview_pl.data.packed import packed
from cogview_pl.durable.read import MAX_IMAGE, UnreadableError, require_size
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

_PATH_COLUMNS = ("file_name", "image", "path", "image_path", "filepath")
_CAPTION_COLUMNS = ("text", "caption")


class Column(Enum):
    """What the cells of a column hold."""

    image = "image"
    """A mapping with `bytes` and `path`."""
    bytes = "bytes"
    text = "text"
    """A text or a list of texts."""
    other = "other"


class ColumnDataset(ImageFileDataset):
    """Rows of a table. A cell of the image column is an image file as bytes, a path, or `{"bytes": …, "path": …}`.

    Args:
        image_size: edge of the square images.
        image_field: the image column; None finds it by its type, else by its name.
        caption_field: the caption column; None takes `text` or `caption`.
        style_field: column with the name of the style.
        style_patterns, min_size, text_fields, decoding, captions, caption_seed: see `ImageFileDataset`.

    Raises:
        UserError: see `ImageFileDataset`; there are patterns but no `style_field`.
    """

    def __init__(
        self,
        image_size: int,
        image_field: str | None,
        caption_field: str | None,
        style_field: str | None,
        style_patterns: Sequence[str],
        min_size: int,
        text_fields: Sequence[str],
        decoding: Decoding | None,
        captions: Captions | str,
        caption_seed: int,
    ) -> None:
        super().__init__(image_size, min_size, style_patterns, text_fields, decoding, captions, caption_seed)
        if style_patterns and style_field is None:
            raise UserError(
                "data.style_patterns is given without data.style_field; set that to the column that names the style"
            )
        self.image_field = image_field
        self.caption_field = caption_field
        self.style_field = style_field
        self._rows = np.arange(0)

    def __len__(self) -> int:
        return len(self._rows)

    def _choose_rows(self, rows: range | np.ndarray) -> None:
        """Make these rows the samples; with `captions=all`, each as often as it has captions."""
        self._rows = packed(np.asarray(rows))
        self._take_each_caption(lambda indices: setattr(self, "_rows", self._rows[indices]))

    @abstractmethod
    def _cell(self, index: int, column: str) -> Any:
        """A cell as Python has it, or a SampleError."""

    @abstractmethod
    def _folder(self, index: int) -> Path:
        """The folder that the paths of a row are relative to."""

    def _choose_columns(self, columns: Mapping[str, Column], where: str) -> list[str]:
        """Find the columns that are read.

        Args:
            columns: all columns.
            where: for messages.

        Raises:
            UserError: a column is missing, or several could be the image.
        """
        self._image_column = self._find_image_column(columns, where)
        if self.style_field is not None and self.text_fields and self.style_field not in columns:
            raise UserError(f"data.style_field={self.style_field}: no such column in {where}; it has {_list(columns)}")
        self._text_columns: dict[str, str] = {}
        for field in self.text_fields:
            given = self.caption_field if field == CAPTION else field
            key = "data.caption_field" if field == CAPTION else OTHER_TEXT
            names = [name for name in (_CAPTION_COLUMNS if given is None else (given,)) if name in columns]
            if not names:
                texts = [name for name, kind in columns.items() if kind == Column.text and name != self._image_column]
                found = f"{key}={given}: no such column" if given is not None else f"{key}: no column text or caption"
                raise UserError(f"{found} in {where}; set it to one of: {', '.join(texts) or 'none (no texts)'}")
            self._text_columns[field] = names[0]
        return [self._image_column, *self._text_columns.values()]

    def _find_image_column(self, columns: Mapping[str, Column], where: str) -> str:
        if self.image_field is not None:
            if self.image_field not in columns:
                raise UserError(
                    f"data.image_field={self.image_field}: no such column in {where}; it has {_list(columns)}"
                )
            return self.image_field
        for wanted in (Column.image, Column.bytes):
            found = [name for name, kind in columns.items() if kind == wanted]
            if len(found) > 1:
                raise UserError(f"data.image_field: {where} has images in {', '.join(found)}; set it to one of them")
            if found:
                return found[0]
        names = [name for name in _PATH_COLUMNS if columns.get(name) == Column.text]
        if not names:
            raise UserError(f"data.image_field: no column of {where} holds images; it has {_list(columns)}")
        return names[0]

    def _columns_note(self) -> str:
        captions = self._text_columns.get(CAPTION)
        return f"images are the column {self._image_column}" + (f", captions the column {captions}" if captions else "")

    def _given_texts(self, index: int, field: str) -> list[str]:
        return field_texts(self._cell(index, self._text_columns[field]), "caption" if field == CAPTION else field)

    def _style(self, index: int) -> str:
        return "" if self.style_field is None else field_text(self._cell(index, self.style_field), "style")

    def _image(self, index: int) -> Path | BinaryIO:
        value = self._cell(index, self._image_column)
        if isinstance(value, Mapping):
            data, path = value.get("bytes"), value.get("path")
        else:
            data, path = (value, None) if isinstance(value, bytes) else (None, value)
        if data is not None:
            try:
                require_size(len(data), MAX_IMAGE)
            except UnreadableError as error:
                raise SampleError(f"the image {error}") from None
            return io.BytesIO(data)
        if path is None:
            raise SampleError("the image is empty")
        if not isinstance(path, str):
            raise SampleError(f"the image is neither bytes nor a path but {str(path)[:40]}")
        if "://" in path:
            raise SampleError(f"{path[:80]} is an address, not a file; download the images first")
        return self._folder(index) / os.path.expanduser(path)


def _list(columns: Iterable[str]) -> str:
    return ", ".join(columns) or "no columns"
