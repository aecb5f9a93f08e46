"""Rows of tokenised samples in a file: `text_length + y * x` little-endian numbers each, pieces, then codes.

Two formats:

- `native`: piece ids as they are. uint16 with sentinel 65535 where all ids fit, else int32 with sentinel -1.
- `cogview`: that of the original's data files. int32, text as ids of the joint vocabulary, sentinel -1.

Shapes: B samples, R = text_length + y * x numbers in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cogview_pl.vocab import Vocabulary

NATIVE = "native"
COGVIEW = "cogview"


@dataclass(kw_only=True)
class RowLayout:
    """What the numbers of a row mean; raises ValueError for an unknown format."""

    format: str = NATIVE
    text_length: int
    grid: tuple[int, int]
    num_pieces: int
    num_codes: int

    def __post_init__(self) -> None:
        if self.format not in (NATIVE, COGVIEW):
            raise ValueError(f"format is {self.format}, known are {NATIVE} and {COGVIEW}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers on disk."""
        small = self.format == NATIVE and max(self.num_pieces, self.num_codes) <= 65535
        return np.dtype("<u2" if small else "<i4")

    @property
    def sentinel(self) -> int:
        """What stands where there is no piece."""
        return 65535 if self.dtype == np.dtype("<u2") else -1

    @property
    def text_ids(self) -> range:
        """The numbers that stand for pieces 0, 1, 2, …"""
        return Vocabulary(self.num_codes, self.num_pieces).pieces if self.format == COGVIEW else range(self.num_pieces)

    @property
    def row_length(self) -> int:
        """Numbers in a row, R."""
        return self.text_length + self.grid[0] * self.grid[1]

    @property
    def row_bytes(self) -> int:
        """Size of a row on disk."""
        return self.row_length * self.dtype.itemsize

    def pack(self, pieces: Sequence[Sequence[int]], codes: torch.Tensor) -> np.ndarray:
        """Rows `(B, R)` of B captions, cut to `text_length` pieces, and codes `(B, y, x)`."""
        rows = np.full((len(pieces), self.row_length), self.sentinel, dtype=self.dtype)
        for row, ids in zip(rows, pieces, strict=True):
            kept = ids[: self.text_length]
            row[: len(kept)] = [self.text_ids.start + piece for piece in kept]
        rows[:, self.text_length :] = codes.flatten(1).cpu().numpy()
        return rows

    def unpack(self, row: np.ndarray) -> tuple[list[int], torch.Tensor]:
        """The pieces of a row `(R,)` without the sentinels, and its codes, int64 `(y, x)`."""
        text = row[: self.text_length].astype(np.int64)
        codes = row[self.text_length :].astype(np.int64).reshape(self.grid)
        return (text[text != self.sentinel] - self.text_ids.start).tolist(), torch.from_numpy(codes)


class StoredRows(Dataset[tuple[list[int], torch.Tensor]]):
    """Rows of a file: `rows[i]` is `(pieces without padding, codes int64 (y, x))`.

    The file is mapped into memory at first use, in each process, and not pickled.

    Args:
        file: rows, and nothing else.
        layout: what they mean.
        span: which of them.
    """

    def __init__(self, file: Path, layout: RowLayout, span: range) -> None:
        self.file = file
        self.layout = layout
        self.span = span
        self._mapped: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.span)

    def __getitem__(self, index: int) -> tuple[list[int], torch.Tensor]:
        return self.layout.unpack(self.raw(slice(self.span[index], self.span[index] + 1))[0])

    def raw(self, rows: slice) -> np.ndarray:
        """Rows as they are on disk, `(B, R)`; counted from the beginning of the file."""
        if self._mapped is None:
            shape = (self.span.stop, self.layout.row_length)
            self._mapped = np.memmap(self.file, self.layout.dtype, mode="r", shape=shape)
        return self._mapped[rows]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}
