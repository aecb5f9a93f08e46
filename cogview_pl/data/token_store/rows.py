"""Rows of tokenised samples in a file, little-endian numbers: text tokens, codes, maybe codes at twice the size.

Two formats:

- `native`: text token ids as they are. uint16 with sentinel 65535 where all ids fit, else int32 with sentinel -1.
- `cogview`: that of the original's data files. int32, text as ids of the joint vocabulary, sentinel -1.

Shapes: B samples, R = text_length + y * x numbers in a row, or text_length + 5 * y * x with the large grid.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from cogview_pl.durable.read import UnreadableError, cannot_be_read, require_file
from cogview_pl.errors import UserError
from cogview_pl.vocab import Vocabulary

NATIVE = "native"
COGVIEW = "cogview"
CHECKSUM = np.dtype("<u4")
"""Type of a row's CRC-32 on disk."""
_WITH_LARGE = 5  # y * x codes, and four times as many at twice the size


def require_counts(values: Mapping[str, object], least: int) -> None:
    """Raises ValueError naming the first value that is no whole number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}")


@dataclass(kw_only=True)
class RowLayout:
    """What the numbers of a row mean; raises ValueError for an unknown format."""

    format: str = NATIVE
    text_length: int
    grid: tuple[int, int]
    text_vocab_size: int
    codebook_size: int
    large: bool = False
    """Rows end with the codes `(2y, 2x)` of the image at twice the size, for super-resolution."""

    def __post_init__(self) -> None:
        if self.format not in (NATIVE, COGVIEW):
            raise ValueError(f"format is {self.format}, known are {NATIVE} and {COGVIEW}")
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
        """What stands where there is no text token."""
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
        codes = self.grid[0] * self.grid[1]
        return self.text_length + (_WITH_LARGE if self.large else 1) * codes

    @property
    def row_bytes(self) -> int:
        """Size of a row on disk."""
        return self.row_length * self.dtype.itemsize

    @property
    def large_grid(self) -> tuple[int, int]:
        """`(2y, 2x)`."""
        return 2 * self.grid[0], 2 * self.grid[1]

    def pack(
        self, text_tokens: Sequence[Sequence[int]], codes: torch.Tensor, large: torch.Tensor | None = None
    ) -> np.ndarray:
        """Rows `(B, R)` of B captions, cut to `text_length`, and codes `(B, y, x)` and maybe `(B, 2y, 2x)`."""
        rows = np.full((len(text_tokens), self.row_length), self.sentinel, dtype=self.dtype)
        for row, ids in zip(rows, text_tokens, strict=True):
            kept = ids[: self.text_length]
            row[: len(kept)] = [self.text_ids.start + text_token for text_token in kept]
        grids = [codes] if large is None else [codes, large]
        rows[:, self.text_length :] = torch.cat([grid.flatten(1).cpu() for grid in grids], 1).numpy()
        return rows

    def unpack(self, row: np.ndarray) -> tuple[list[int], torch.Tensor]:
        """The text tokens of a row `(R,)` without the sentinels, and its codes, int64 `(y, x)`."""
        text = row[: self.text_length].astype(np.int64)
        codes = row[self.text_length : self._end_of_codes].astype(np.int64).reshape(self.grid)
        return (text[text != self.sentinel] - self.text_ids.start).tolist(), torch.from_numpy(codes)

    def unpack_large(self, row: np.ndarray) -> torch.Tensor:
        """The codes at twice the size, int64 `(2y, 2x)`, of a row that has them."""
        return torch.from_numpy(row[self._end_of_codes :].astype(np.int64).reshape(self.large_grid))

    @property
    def _end_of_codes(self) -> int:
        return self.text_length + self.grid[0] * self.grid[1]


class StoredRows(Dataset[tuple[list[int], torch.Tensor]]):
    """Rows of a file: `rows[i]` is `(text tokens without padding, codes int64 (y, x))`.

    Each process opens the file for itself, at first use. Rows are read, not mapped into memory, where a file that
    becomes shorter or a disk that fails would kill the process.

    Args:
        file: rows, and nothing else.
        layout: what they mean.
        span: which of them.
        checksums: file with the CRC-32 of each row, little-endian uint32; None where there are none. A row is compared
            with its own when it is read.

    Reading a row raises UserError where it is missing, cannot be read or is not what was written.
    """

    def __init__(self, file: Path, layout: RowLayout, span: range, checksums: Path | None = None) -> None:
        self.file = file
        self.layout = layout
        self.span = span
        self.checksums = checksums
        self._rows = _Records(file, layout.row_bytes)
        self._sums = None if checksums is None else _Records(checksums, CHECKSUM.itemsize)

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int) -> tuple[list[int], torch.Tensor]:
        return self.layout.unpack(self.raw(self.span[index]))

    def large(self, index: int) -> torch.Tensor:
        """Codes of the image at twice the size, int64 `(2y, 2x)`, where the rows have them."""
        return self.layout.unpack_large(self.raw(self.span[index]))

    def raw(self, number: int) -> np.ndarray:
        """A row as it is on disk, `(R,)`; counted from the beginning of the file."""
        data = self._rows.read(number)
        if self._sums is not None and zlib.crc32(data) != np.frombuffer(self._sums.read(number), CHECKSUM)[0]:
            raise UserError(
                f"{self.file}: row {number} is damaged, its checksum is wrong; copy the token store again or run "
                "task=tokenize again"
            )
        return np.frombuffer(data, self.layout.dtype)

    def key(self, index: int) -> str:
        """What names a sample in a message."""
        return f"row {self.span[index]} of {self.file.name}"


class _Records:
    """Records of one size in a file, read at any place, also by forked and spawned workers."""

    def __init__(self, file: Path, size: int) -> None:
        self._file = file
        self._size = size
        self._stream: BinaryIO | None = None

    def read(self, number: int) -> bytes:
        """Record `number`; raises UserError if it is not there or the disk fails."""
        try:
            if self._stream is None:
                require_file(self._file)
                self._stream = self._file.open("rb")
            data = os.pread(self._stream.fileno(), self._size, number * self._size)
        except UnreadableError as error:
            raise UserError(f"{self._file} {error}; copy the token store again") from None
        except OSError as error:
            raise UserError(f"{self._file} {cannot_be_read(error)}; copy the token store again") from error
        if len(data) != self._size:
            raise UserError(f"{self._file} has become shorter: row {number} is missing; copy the token store again")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}


class WithoutText(Dataset[tuple[list[int], torch.Tensor]]):
    """The same rows with empty texts.

    Mixed into a training set they are conditioning dropout: the model learns what images look like whatever the
    text, which classifier-free guidance needs.
    """

    def __init__(self, rows: StoredRows) -> None:
        self.rows = rows
        self.layout = rows.layout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], torch.Tensor]:
        return [], self.rows[index][1]

    def large(self, index: int) -> torch.Tensor:
        """Codes of the image at twice the size."""
        return self.rows.large(index)

    def key(self, index: int) -> str:
        """What names a sample in a message."""
        return self.rows.key(index)
