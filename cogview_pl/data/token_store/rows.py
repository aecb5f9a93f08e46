"""Rows of tokenised samples in a file: little-endian numbers, the text tokens of each field, then codes.

Two formats:

- `native`: text token ids. uint16 with sentinel 65535 if all ids fit, else int32 with sentinel -1.
- `cogview`: the format of the original's data files. int32, text as ids of the joint vocabulary, sentinel -1.

Shapes: B samples, F text fields, I further images, R = F * text_length + (1 + I) * y * x numbers in a row, and four
times y * x more with the large grid.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from cogview_pl.data.config import StoreFormat
from cogview_pl.durable.read import require_file, unreadable_named
from cogview_pl.errors import UserError
from cogview_pl.vocab import Vocabulary
from cogview_pl.vocab.roles import CAPTION

NATIVE = StoreFormat.native.value
COGVIEW = StoreFormat.cogview.value
CHECKSUM = np.dtype("<u4")
"""Type of the CRC-32 of a row on disk."""
_LARGE = 4  # times y * x codes of an image at twice the size

TextTokens = dict[str, list[int]]
"""Text token ids of one sample, without padding, by text field."""


def flat_ids(texts: Iterable[Sequence[int]]) -> np.ndarray:
    """Ids of several texts, one after the other, int64."""
    return np.fromiter(chain.from_iterable(texts), np.int64)


def require_counts(values: Mapping[str, object], least: int) -> None:
    """Raises ValueError naming the first value that is no whole number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}")


@dataclass(kw_only=True)
class RowLayout:
    """The meaning of the numbers of a row; raises ValueError for values that do not fit together."""

    format: str = NATIVE
    text_length: int
    grid: tuple[int, int]
    text_vocab_size: int
    codebook_size: int
    large: bool = False
    """Whether rows end with the codes `(2y, 2x)` of the image at twice the size, for super-resolution."""
    text_fields: tuple[str, ...] = (CAPTION,)
    """Names of the texts of a sample; each has `text_length` numbers in a row."""
    image_fields: tuple[str, ...] = ()
    """Names of the further images of a sample, whose codes `(y, x)` follow those of its own image."""

    def __post_init__(self) -> None:
        if self.format not in (NATIVE, COGVIEW):
            raise ValueError(f"format is {self.format}, known are {NATIVE} and {COGVIEW}")
        fields = self.text_fields
        if not fields or len(set(fields)) < len(fields) or not all(name and isinstance(name, str) for name in fields):
            raise ValueError(f"text_fields is {fields!r}")
        if self.format == COGVIEW and len(fields) > 1:
            raise ValueError(f"format is {COGVIEW}, whose rows hold one text, and text_fields is {fields!r}")
        others = self.image_fields
        if len(set(others)) < len(others) or not all(name and isinstance(name, str) for name in others):
            raise ValueError(f"image_fields is {others!r}")
        if self.format == COGVIEW and others:
            raise ValueError(f"format is {COGVIEW}, whose rows hold one image, and image_fields is {others!r}")
        sizes = {
            "text_length": self.text_length,
            "text_vocab_size": self.text_vocab_size,
            "codebook_size": self.codebook_size,
        }
        require_counts({**sizes, "y": self.grid[0], "x": self.grid[1]}, least=1)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers on disk."""
        small = self.format == NATIVE and max(self.text_vocab_size, self.codebook_size) <= 65535
        return np.dtype("<u2" if small else "<i4")

    @property
    def sentinel(self) -> int:
        """The number that fills the places without a text token."""
        return 65535 if self.dtype == np.dtype("<u2") else -1

    @property
    def text_ids(self) -> range:
        """The numbers that stand for text tokens 0, 1, 2, …"""
        return (
            Vocabulary(self.codebook_size, self.text_vocab_size).text_tokens
            if self.format == COGVIEW
            else range(self.text_vocab_size)
        )

    @property
    def row_length(self) -> int:
        """Numbers in a row, R."""
        return self._end_of_others + (_LARGE * self._codes if self.large else 0)

    @property
    def row_bytes(self) -> int:
        """Size of a row on disk."""
        return self.row_length * self.dtype.itemsize

    @property
    def large_grid(self) -> tuple[int, int]:
        """`(2y, 2x)`."""
        return 2 * self.grid[0], 2 * self.grid[1]

    def pack(
        self,
        text_tokens: Mapping[str, Sequence[Sequence[int]]],
        codes: torch.Tensor,
        large: torch.Tensor | None = None,
        others: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> np.ndarray:
        """Rows `(B, R)`.

        Args:
            text_tokens: for each text field the text token ids of B samples, which are cut to `text_length`.
            codes: `(B, y, x)`.
            large: `(B, 2y, 2x)`, if the rows have them.
            others: for each of `image_fields`, `(B, y, x)`.
        """
        rows = np.full((len(codes), self.row_length), self.sentinel, dtype=self.dtype)
        places = np.arange(self.text_length)
        for number, field in enumerate(self.text_fields):
            kept = [ids[: self.text_length] for ids in text_tokens[field]]
            counts = np.array([len(ids) for ids in kept], np.int64)
            texts = rows[:, number * self.text_length : (number + 1) * self.text_length]
            texts[places < counts[:, None]] = self.text_ids.start + flat_ids(kept)
        grids = [codes, *(others[name] for name in self.image_fields), *([] if large is None else [large])]
        rows[:, self._end_of_texts :] = torch.cat([grid.flatten(1).cpu() for grid in grids], 1).numpy()
        return rows

    def unpack(self, row: np.ndarray) -> tuple[TextTokens, torch.Tensor]:
        """The text tokens of a row `(R,)`, and its codes, int64 `(y, x)`."""
        texts = row[: self._end_of_texts].astype(np.int64).reshape(-1, self.text_length)
        codes = row[self._end_of_texts : self._end_of_codes].astype(np.int64).reshape(self.grid)
        tokens = [(text[text != self.sentinel] - self.text_ids.start).tolist() for text in texts]
        return dict(zip(self.text_fields, tokens, strict=True)), torch.from_numpy(codes)

    def unpack_others(self, row: np.ndarray) -> dict[str, torch.Tensor]:
        """Codes of the further images of a row, int64 `(y, x)`, by name."""
        codes = torch.from_numpy(row[self._end_of_codes : self._end_of_others].astype(np.int64))
        return dict(zip(self.image_fields, codes.view(-1, *self.grid), strict=True))

    def unpack_large(self, row: np.ndarray) -> torch.Tensor:
        """The codes at twice the size, int64 `(2y, 2x)`, of a row that has them."""
        return torch.from_numpy(row[self._end_of_others :].astype(np.int64).reshape(self.large_grid))

    @property
    def _end_of_texts(self) -> int:
        return len(self.text_fields) * self.text_length

    @property
    def _codes(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def _end_of_codes(self) -> int:
        return self._end_of_texts + self._codes

    @property
    def _end_of_others(self) -> int:
        return self._end_of_codes + len(self.image_fields) * self._codes


class TokenRows(Dataset[tuple[TextTokens, torch.Tensor]]):
    """Rows of a file: `rows[i]` is `(text tokens by field, codes int64 (y, x))`.

    Each process opens the file at first use. Rows are read, not mapped into memory: with a mapping, a file that becomes
    shorter or a disk that fails would kill the process.

    Args:
        file: contains rows only.
        layout: of the rows.
        span: numbers of the rows to use.
        checksums: file with the CRC-32 of each row, little-endian uint32, or None. A row is compared with its checksum
            when it is read.
        pieces: files that together hold the rows of `file`, in order, with their numbers of rows; None: `file` alone.

    Reading a row raises UserError if it is missing, unreadable or damaged.
    """

    def __init__(
        self,
        file: Path,
        layout: RowLayout,
        span: range,
        checksums: Path | None = None,
        pieces: Sequence[tuple[Path, int]] | None = None,
    ) -> None:
        self.file = file
        self.layout = layout
        self.span = span
        self.checksums = checksums
        given = [(file, len(span))] if pieces is None else pieces
        self._pieces = [_Records(piece, layout.row_bytes) for piece, _ in given]
        self._starts = [0, *accumulate(rows for _, rows in given[:-1])]
        self._sums = None if checksums is None else _Records(checksums, CHECKSUM.itemsize)

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int) -> tuple[TextTokens, torch.Tensor]:
        return self.layout.unpack(self.raw(self.span[index]))

    def others(self, index: int) -> dict[str, torch.Tensor]:
        """Codes of the further images of a row, int64 `(y, x)`, by name."""
        return self.layout.unpack_others(self.raw(self.span[index])) if self.layout.image_fields else {}

    def large(self, index: int) -> torch.Tensor:
        """Codes of the image at twice the size, int64 `(2y, 2x)`, if the rows have them."""
        return self.layout.unpack_large(self.raw(self.span[index]))

    def raw(self, number: int) -> np.ndarray:
        """The numbers of a row, `(R,)`; `number` counts from the beginning of the file."""
        place = bisect_right(self._starts, number) - 1
        piece, start = self._pieces[place], self._starts[place]
        data = piece.read(number - start)
        if self._sums is not None and zlib.crc32(data) != np.frombuffer(self._sums.read(number), CHECKSUM)[0]:
            raise UserError(
                f"{piece.file}: row {number - start} is damaged, its checksum is wrong; copy the token store again or "
                "run task=tokenize again"
            )
        return np.frombuffer(data, self.layout.dtype)

    def key(self, index: int) -> str:
        """The name of a sample in a message."""
        return f"row {self.span[index]} of {self.file.name}"


class _Records:
    """Records of one size in a file, read at any place, also by forked and spawned workers."""

    def __init__(self, file: Path, size: int) -> None:
        self.file = file
        self._size = size
        self._stream: BinaryIO | None = None

    def read(self, number: int) -> bytes:
        """Record `number`; raises UserError if it is not there or the disk fails."""
        with unreadable_named(self.file, "copy the token store again"):
            if self._stream is None:
                require_file(self.file)
                self._stream = self.file.open("rb")
            data = os.pread(self._stream.fileno(), self._size, number * self._size)
        if len(data) != self._size:
            raise UserError(f"{self.file} has become shorter: row {number} is missing; copy the token store again")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}


class WithoutText(Dataset[tuple[TextTokens, torch.Tensor]]):
    """The same rows with empty texts, for conditioning dropout.

    From samples without a text the model learns what images look like in general, which classifier-free guidance needs.

    Args:
        rows: the rows.
        keep: a text field that stays, because the model learns to write it.
    """

    def __init__(self, rows: TokenRows, keep: str | None = None) -> None:
        self.rows = rows
        self.keep = keep
        self.layout = rows.layout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[TextTokens, torch.Tensor]:
        texts, codes = self.rows[index]
        return {field: ids if field == self.keep else [] for field, ids in texts.items()}, codes

    def others(self, index: int) -> dict[str, torch.Tensor]:
        """Codes of the further images."""
        return self.rows.others(index)

    def large(self, index: int) -> torch.Tensor:
        """Codes of the image at twice the size."""
        return self.rows.large(index)

    def key(self, index: int) -> str:
        """The name of a sample in a message."""
        return self.rows.key(index)
