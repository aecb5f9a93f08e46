"""Rows of tokenised samples in a file, little-endian numbers: pieces, codes, maybe codes at twice the size.

Two formats:

- `native`: piece ids as they are. uint16 with sentinel 65535 where all ids fit, else int32 with sentinel -1.
- `cogview`: that of the original's data files. int32, text as ids of the joint vocabulary, sentinel -1.

Shapes: B samples, R = text_length + y * x numbers in a row, or text_length + 5 * y * x with the large grid.
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
_WITH_LARGE = 5  # y * x codes, and four times as many at twice the size


@dataclass(kw_only=True)
class RowLayout:
    """What the numbers of a row mean; raises ValueError for an unknown format."""

    format: str = NATIVE
    text_length: int
    grid: tuple[int, int]
    num_pieces: int
    num_codes: int
    large: bool = False
    """Rows end with the codes `(2y, 2x)` of the picture at twice the size, for super-resolution."""

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
        self, pieces: Sequence[Sequence[int]], codes: torch.Tensor, large: torch.Tensor | None = None
    ) -> np.ndarray:
        """Rows `(B, R)` of B captions, cut to `text_length` pieces, and codes `(B, y, x)` and maybe `(B, 2y, 2x)`."""
        rows = np.full((len(pieces), self.row_length), self.sentinel, dtype=self.dtype)
        for row, ids in zip(rows, pieces, strict=True):
            kept = ids[: self.text_length]
            row[: len(kept)] = [self.text_ids.start + piece for piece in kept]
        grids = [codes] if large is None else [codes, large]
        rows[:, self.text_length :] = torch.cat([grid.flatten(1).cpu() for grid in grids], 1).numpy()
        return rows

    def unpack(self, row: np.ndarray) -> tuple[list[int], torch.Tensor]:
        """The pieces of a row `(R,)` without the sentinels, and its codes, int64 `(y, x)`."""
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
        return self.layout.unpack(self._row(index))

    def large(self, index: int) -> torch.Tensor:
        """Codes of the picture at twice the size, int64 `(2y, 2x)`, where the rows have them."""
        return self.layout.unpack_large(self._row(index))

    def _row(self, index: int) -> np.ndarray:
        return self.raw(slice(self.span[index], self.span[index] + 1))[0]

    def raw(self, rows: slice) -> np.ndarray:
        """Rows as they are on disk, `(B, R)`; counted from the beginning of the file."""
        if self._mapped is None:
            shape = (self.span.stop, self.layout.row_length)
            self._mapped = np.memmap(self.file, self.layout.dtype, mode="r", shape=shape)
        return self._mapped[rows]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}


class WithoutText(Dataset[tuple[list[int], torch.Tensor]]):
    """The same rows with empty texts.

    Mixed into a training set they are conditioning dropout: the model learns what pictures look like whatever the
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
        """Codes of the picture at twice the size."""
        return self.rows.large(index)
