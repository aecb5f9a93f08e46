"""Token store: a data set as text tokens and image codes on disk, written once by `task=tokenize` (`writer.py`).

A token store is a folder:

- `header.json`: sizes, tokenizers and the progress of the writer. It is replaced after the rows are on disk, so it
  never counts a row that is not there.
- `SPLIT.bin`: the rows (`rows.py`), in one of two formats. A store that was joined from N parts (`joining.py`) has the
  rows in pieces `SPLIT.0001-of-N.bin` and so on; all else is as if one process had written it.
- `SPLIT.keys.txt`: the key of each row, one per line; its checksum is in the header.
- `SPLIT.crc32`: the checksum of each row, uint32. Stores of earlier versions have none.

A writer that was killed continues where the header says, and ends with the same bytes as one that was not killed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import reduce
from itertools import islice
from pathlib import Path

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.token_store.header import (
    HEADER,
    START_AGAIN,
    TokenStoreHeader,
    checksums_file,
    keys_file,
    row_files,
    rows_file,
)
from cogview_pl.data.token_store.rows import CHECKSUM, TokenRows
from cogview_pl.durable.read import UnreadableError, require_file, unreadable_named
from cogview_pl.errors import UserError

COPY_AGAIN = "copy the token store again or run task=tokenize again"
_CHUNK = 2**20  # bytes of a file read at once


class TokenStore:
    """A finished token store, read-only. Open it with `TokenStore.open`."""

    def __init__(self, folder: Path, header: TokenStoreHeader) -> None:
        self.folder = folder
        self.header = header

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Check the header and the sizes of the files; reads no rows.

        Raises:
            UserError: no store, an unfinished or damaged one, one of another version, or only a part of one.
        """
        store = cls.open_part(folder)
        if store.header.part is not None:
            raise UserError(
                f"{folder} holds part {store.header.part.number} of {store.header.part.count} of a token store; join "
                "the parts: task=tokenize token_store.join=[RUN_FOLDER_OF_EACH_PART]"
            )
        return store

    @classmethod
    def open_part(cls, folder: str | Path) -> TokenStore:
        """As `open`, and a part may be opened too."""
        folder = Path(folder)
        header = TokenStoreHeader.load(folder)
        if not header.complete:
            raise UserError(f"{folder}: the token store was not finished; run task=tokenize resume=true")
        for name, split in header.splits.items():
            if _pieces(folder, name, header) is None:
                _require_rows(rows_file(folder, name), split.rows, header.row_bytes)
            _require_rows(keys_file(folder, name), split.key_bytes, 1)
            if header.checksums:
                _require_rows(checksums_file(folder, name), split.rows, CHECKSUM.itemsize)
        return cls(folder, header)

    def fingerprint(self) -> str:
        """A digest of the header and the checksums of all rows, which differs if anything in the store differs.

        Reads 4 bytes per row. Of a store without checksums it takes the sizes and times of the files.

        Raises:
            UserError: the file of checksums is damaged.
        """
        found = Fingerprint("token store")
        found.add(self.header.values())
        for name, split in self.header.splits.items():
            if not self.header.checksums:
                found.add_file(rows_file(self.folder, name))
                continue
            found.add_parts(split.rows * CHECKSUM.itemsize, self.checksums(name))
        return found.hexdigest()

    def checksums(self, name: str) -> Iterator[bytes]:
        """Parts of the file of checksums of a split; raises UserError before the first one if the file is damaged."""
        file, split = checksums_file(self.folder, name), self.header.splits[name]
        with unreadable_named(file, COPY_AGAIN):
            require_file(file, split.rows * CHECKSUM.itemsize)
            if split.sums_crc32 not in (None, _crc32(file)):
                raise UserError(f"{file} is damaged or of another store (the header says so); {COPY_AGAIN}")
            yield from _parts(file)

    def split(self, name: str) -> TokenStoreSplit:
        """The rows of one split.

        Raises:
            UserError: there is no such split.
        """
        if name not in self.header.splits:
            known = ", ".join(self.header.splits)
            raise UserError(f"{self.folder}: no split {name} in the token store, only {known}; {START_AGAIN}")
        return TokenStoreSplit(self.folder, self.header, name)

    def require(self, *, text_tokenizer: str, image_tokenizer: str) -> None:
        """Check that the store was made with the tokenizers of this run.

        Raises:
            UserError: it was not.
        """
        wanted = {"text_tokenizer": text_tokenizer, "image_tokenizer": image_tokenizer}
        for name, value in wanted.items():
            found = getattr(self.header, name)
            if found != value:
                raise UserError(
                    f"{self.folder}: the token store was made with {name} {found}, this run uses {value}; "
                    "use that one, or run task=tokenize with the new one"
                )


class TokenStoreSplit(TokenRows):
    """The rows of a split."""

    def __init__(self, folder: Path, header: TokenStoreHeader, name: str) -> None:
        sums = checksums_file(folder, name) if header.checksums else None
        span = range(header.splits[name].rows)
        super().__init__(rows_file(folder, name), header, span, sums, _pieces(folder, name, header))
        self._keys = keys_file(folder, name)
        self._header = header.splits[name]

    def keys(self) -> list[str]:
        """The key of each row.

        Raises:
            UserError: the file is damaged or cannot be read.
        """
        self._require_whole()
        found = self._lines(0, None)
        if len(found) != len(self):
            raise UserError(f"{self._keys} has {len(found)} keys for {len(self)} rows; {COPY_AGAIN}")
        return found

    def key(self, index: int) -> str:
        """The key of a row. Reads the whole file for its checksum; raises as `keys` does."""
        self._require_whole()
        place = self.span[index]
        found = self._lines(place, place + 1)
        if not found:
            raise UserError(f"{self._keys} has no key for row {place}; {COPY_AGAIN}")
        return found[0]

    def _lines(self, start: int, stop: int | None) -> list[str]:
        try:
            with (
                unreadable_named(self._keys, COPY_AGAIN),
                self._keys.open(encoding="utf-8", newline="\n") as stream,
            ):
                return [line.rstrip("\n") for line in islice(stream, start, stop)]
        except UnicodeDecodeError:
            raise UserError(f"{self._keys} is damaged, it is not UTF-8 text; {COPY_AGAIN}") from None

    def _require_whole(self) -> None:
        """Compare the checksum of the keys, if the store has one."""
        with unreadable_named(self._keys, COPY_AGAIN):
            require_file(self._keys, self._header.key_bytes)
            if self._header.keys_crc32 is None:
                return
            found = _crc32(self._keys)
        if found != self._header.keys_crc32:
            raise UserError(f"{self._keys} is damaged, its checksum is wrong; {COPY_AGAIN}")


def _pieces(folder: Path, split: str, header: TokenStoreHeader) -> list[tuple[Path, int]] | None:
    """The pieces of a split of a joined store, with their numbers of rows; None for a split in one file.

    Raises:
        UserError: they do not hold the rows that the header counts.
    """
    files = row_files(folder, split)
    if files == [rows_file(folder, split)]:
        return None
    size, pieces = header.row_bytes, []
    for file in files:
        with unreadable_named(file, COPY_AGAIN):
            rows, rest = divmod(require_file(file).st_size, size)
        if rest:
            raise UserError(f"{file} has {rows * size + rest} bytes, no whole number of rows of {size}; {COPY_AGAIN}")
        pieces.append((file, rows))
    found, wanted = sum(rows for _, rows in pieces), header.splits[split].rows
    if found != wanted:
        raise UserError(
            f"{files[0]} and the other pieces have {found} rows, {HEADER} says {wanted}; one of them is truncated: "
            f"{COPY_AGAIN}"
        )
    return pieces


def _parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while part := stream.read(_CHUNK):
            yield part


def _crc32(file: Path) -> int:
    return reduce(lambda found, part: zlib.crc32(part, found), _parts(file), 0)


def _require_rows(file: Path, rows: int, size: int) -> None:
    try:
        found = require_file(file).st_size
    except UnreadableError as error:
        if not error.missing:
            raise UserError(f"{file} {error}; {COPY_AGAIN}") from None
        found = 0
    if found != rows * size:
        raise UserError(
            f"{file} has {found} bytes, {HEADER} says {rows} rows of {size}; "
            "the file is truncated or of another store: copy it again or run task=tokenize again"
        )
