"""Data files of the original as token stores: rows only, without header, keys, tokenizers or splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.token_store.rows import COGVIEW, RowLayout, TokenRows
from cogview_pl.durable.read import find, require_file, unreadable_named
from cogview_pl.errors import UserError

TEXT_LENGTH = 64
"""Number of text ids in a row of the original's files."""

_CHECKED_AT_OPENING = 1024  # rows, evenly spread; every row is checked again when it is read


def refuse_lmdb(path: Path) -> None:
    """Raises UserError if `path` cannot be read or is an LMDB, the other data format of the original."""
    with unreadable_named(f"data.token_store={path}", "give the folder of a run of task=tokenize, or a file"):
        inside = find(path / "data.mdb")
    if path.suffix == ".lmdb" or path.name == "data.mdb" or inside is not None:
        raise UserError(
            f"data.token_store={path} is an LMDB: its rows are pickled Python objects, and loading those can run any "
            f"code, so it is not read; convert it where it was made to rows of {TEXT_LENGTH} text ids and the codes as "
            "int32, or tokenise the images again with task=tokenize"
        )


class ReleasedFile:
    """A data file of the original, read-only. Open it with `ReleasedFile.open`.

    The last rows are the validation split, so no row is in both splits (in the original some rows are).
    """

    def __init__(self, file: Path, layout: RowLayout, spans: dict[str, range]) -> None:
        self.file = file
        self.header = layout
        self._spans = spans

    @classmethod
    def open(
        cls,
        file: str | Path,
        *,
        grid: tuple[int, int],
        text_vocab_size: int,
        codebook_size: int,
        val_fraction: float,
        text_length: int = TEXT_LENGTH,
    ) -> ReleasedFile:
        """Check the size of the file, and the ids of some of its rows.

        Args:
            file: rows of `text_length` ids of the joint vocabulary, -1 where unused, and `y * x` codes, as
                little-endian int32.
            grid: `(y, x)` of the codes.
            text_vocab_size, codebook_size: sizes of the vocabularies of the two tokenizers that made it.
            val_fraction: share of the rows for validation, 0 … 1. Strictly between 0 and 1 neither split of two
                rows or more is empty.

        Raises:
            UserError: the file cannot be read, the size or the ids do not fit, or no rows are left to train on.
        """
        file = Path(file)
        layout = RowLayout(
            text_length=text_length,
            grid=grid,
            text_vocab_size=text_vocab_size,
            codebook_size=codebook_size,
            format=COGVIEW,
        )
        with unreadable_named(f"data.token_store={file}", "give a file of rows"):
            size = require_file(file).st_size
        num_rows, rest = divmod(size, layout.row_bytes)
        if rest or not num_rows:
            raise UserError(
                f"data.token_store={file} has {size} bytes, a row has {layout.row_bytes} ({_size(layout)} as "
                "int32); the file is truncated or was made with another image tokenizer: copy it again or set "
                "image_tokenizer.path to that one"
            )
        num_val = round(val_fraction * num_rows)
        if 0 < val_fraction < 1:
            num_val = min(max(num_val, 1), num_rows - 1)
        if num_val == num_rows:
            raise UserError(f"sequences.val_fraction={val_fraction} leaves no rows of {file} to train on; lower it")
        rows = _CheckedRows(file, layout, range(num_rows))
        for number in range(0, num_rows, -(-num_rows // _CHECKED_AT_OPENING)):
            rows.raw(number)
        spans = {"train": range(num_rows - num_val), "val": range(num_rows - num_val, num_rows)}
        return cls(file, layout, spans)

    def fingerprint(self) -> str:
        """A digest of the file's size and time, of what its rows mean, and of the split."""
        found = Fingerprint("released file")
        found.add_file(
            self.file, vars(self.header), {name: [span.start, span.stop] for name, span in self._spans.items()}
        )
        return found.hexdigest()

    def split(self, name: str) -> TokenRows:
        """The rows of `train` or `val`; reading one with ids that do not fit raises UserError."""
        return _CheckedRows(self.file, self.header, self._spans[name])


class _CheckedRows(TokenRows):
    """Rows without checksums: their ids are checked when they are read."""

    def raw(self, number: int) -> np.ndarray:
        found = super().raw(number)
        text, codes = np.split(found, [self.layout.text_length])
        self._require(number, text[text != self.layout.sentinel], self.layout.text_ids, "text id")
        self._require(number, codes, range(self.layout.codebook_size), "code")
        return found

    def _require(self, number: int, ids: np.ndarray, allowed: range, name: str) -> None:
        wrong = ids[(ids < allowed.start) | (ids >= allowed.stop)]
        if len(wrong):
            raise UserError(
                f"data.token_store={self.file}: row {number} has {name} {wrong[0]}, it must be in [{allowed.start}, "
                f"{allowed.stop}); rows must be {_size(self.layout)}, and text.model and image_tokenizer.path the "
                "tokenizers that made them"
            )


def _size(layout: RowLayout) -> str:
    return f"{layout.text_length} text ids and {layout.grid[0]}x{layout.grid[1]} codes"
