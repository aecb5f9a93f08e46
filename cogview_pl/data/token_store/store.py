"""Token store: a data set as text tokens and image codes on disk, written once by `task=tokenize`.

A folder:

- `header.json`: what the store is and, while it is written, how far it has come. It is replaced as a whole
  after the rows are on disk, so it never counts a row that is not there.
- `SPLIT.bin`: the rows (`rows.py`), in one of two formats.
- `SPLIT.keys.txt`: the key of each row, one per line; its checksum is in the header.
- `SPLIT.crc32`: the checksum of each row, uint32, with which a row is compared when it is read. Stores of earlier
  versions have none, and are read without.

A writer that was killed goes on where the header says, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.token_store.header import (
    HEADER,
    START_AGAIN,
    Header,
    SplitHeader,
    checksums_file,
    keys_file,
    rows_file,
)
from cogview_pl.data.token_store.rows import CHECKSUM, NATIVE, StoredRows
from cogview_pl.durable.read import UnreadableError, cannot_be_read, find, read_file, require_file
from cogview_pl.durable.write import append, disk_full_named, no_links
from cogview_pl.errors import UserError

_COPY_AGAIN = "copy the token store again or run task=tokenize again"
_CHUNK = 2**20  # bytes of a file of keys read at once


class StoreWriter:
    """Writes a token store, or goes on with an unfinished one in the same folder.

    Args:
        folder: made if it is missing.
        text_length: text tokens in a row; longer captions are cut, and counted in the header.
        grid: `(y, x)` of the codes.
        text_vocab_size, codebook_size: sizes of the two vocabularies.
        text_tokenizer, image_tokenizer: identities, which `TokenStore.require` compares.
        splits: name → samples of the source data set.
        format: of the rows, `native` or `cogview`.
        large: rows hold the codes of the image at twice the size as well.

    Raises:
        UserError: the folder holds a store with other sizes or identities, or one that has lost data or cannot be
            written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        text_length: int,
        grid: tuple[int, int],
        text_vocab_size: int,
        codebook_size: int,
        text_tokenizer: str,
        image_tokenizer: str,
        splits: Mapping[str, int],
        format: str = NATIVE,
        large: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.header = Header(
            text_length=text_length,
            grid=(grid[0], grid[1]),
            text_vocab_size=text_vocab_size,
            codebook_size=codebook_size,
            text_tokenizer=text_tokenizer,
            image_tokenizer=image_tokenizer,
            splits={name: SplitHeader(source) for name, source in splits.items()},
            format=format,
            large=large,
            checksums=True,
        )
        if _exists(self.folder / HEADER):
            found = Header.load(self.folder)
            _require_same(self.folder, _identity(found), _identity(self.header))
            self.header = found
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.header.save(self.folder)
        for name, split in self.header.splits.items():
            _cut(rows_file(self.folder, name), split.rows * self.header.row_bytes)
            _cut(keys_file(self.folder, name), split.key_bytes)
            if self.header.checksums:
                _cut(checksums_file(self.folder, name), split.rows * CHECKSUM.itemsize)

    def resume_index(self, split: str) -> int:
        """Index in the source of the next sample to tokenise; the source's size when the split is done."""
        return self.header.splits[split].next

    def append(
        self,
        split: str,
        text_tokens: Sequence[Sequence[int]],
        codes: torch.Tensor,
        keys: Sequence[str],
        next_index: int,
        large: torch.Tensor | None = None,
    ) -> None:
        """Add rows; when this returns they are on disk.

        Args:
            split: its name.
            text_tokens: text token ids of B captions, of any length.
            codes: integers `(B, y, x)`. B may be 0, where all samples were skipped.
            keys: of the B samples.
            next_index: source samples done so far, the skipped ones included.
            large: codes `(B, 2y, 2x)` of the same images at twice the size, if the store holds them.

        Raises:
            ValueError: sizes or ids that do not fit the header, or a finished store.
        """
        now = self.header.splits[split]
        if self.header.complete:
            raise ValueError("the store is complete")
        if not now.next + len(keys) <= next_index <= now.source:
            raise ValueError(f"next_index={next_index}: {now.next} done, {len(keys)} new, of {now.source}")
        self._check_ids(text_tokens, codes, large, len(keys))
        names = "".join(" ".join(key.splitlines()) + "\n" for key in keys).encode("utf-8", "backslashreplace")
        rows = self.header.pack(text_tokens, codes, large)
        append(rows_file(self.folder, split), rows.tobytes())
        append(keys_file(self.folder, split), names)
        if self.header.checksums:
            sums = np.array([zlib.crc32(row.tobytes()) for row in rows], CHECKSUM)
            append(checksums_file(self.folder, split), sums.tobytes())
            if now.sums_crc32 is not None:
                now.sums_crc32 = zlib.crc32(sums.tobytes(), now.sums_crc32)
        now.next = next_index
        now.rows += len(keys)
        now.truncated += sum(len(ids) > self.header.text_length for ids in text_tokens)
        now.key_bytes += len(names)
        if now.keys_crc32 is not None:
            now.keys_crc32 = zlib.crc32(names, now.keys_crc32)
        self.header.save(self.folder)

    def finish(self) -> None:
        """Declare the store complete.

        Raises:
            ValueError: source samples are left.
        """
        for name, split in self.header.splits.items():
            if split.next != split.source:
                raise ValueError(f"split {name}: {split.next} of {split.source} samples are done")
        self.header.complete = True
        self.header.save(self.folder)

    def _check_ids(
        self, text_tokens: Sequence[Sequence[int]], codes: torch.Tensor, large: torch.Tensor | None, num_rows: int
    ) -> None:
        header = self.header
        if codes.shape != (num_rows, *header.grid) or len(text_tokens) != num_rows:
            raise ValueError(f"{num_rows} keys, {len(text_tokens)} texts, codes {tuple(codes.shape)} do not fit")
        if header.large != (large is not None) or (large is not None and large.shape != (num_rows, *header.large_grid)):
            raise ValueError(f"large={header.large}: large codes {None if large is None else tuple(large.shape)}")
        for grid in (codes,) if large is None else (codes, large):
            if grid.numel() and not 0 <= int(grid.min()) <= int(grid.max()) < header.codebook_size:
                raise ValueError(f"codes must be in [0, {header.codebook_size})")
        if any(not 0 <= text_token < header.text_vocab_size for ids in text_tokens for text_token in ids):
            raise ValueError(f"text tokens must be in [0, {header.text_vocab_size})")


class TokenStore:
    """A finished token store, read-only. Open it with `TokenStore.open`."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.header = header

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Check the header and the sizes of the files; reads no rows.

        Raises:
            UserError: no store, an unfinished or damaged one, or one of another version.
        """
        folder = Path(folder)
        header = Header.load(folder)
        if not header.complete:
            raise UserError(f"{folder}: the token store was not finished; run task=tokenize resume=true")
        for name, split in header.splits.items():
            _require_rows(rows_file(folder, name), split.rows, header.row_bytes)
            _require_rows(keys_file(folder, name), split.key_bytes, 1)
            if header.checksums:
                _require_rows(checksums_file(folder, name), split.rows, CHECKSUM.itemsize)
        return cls(folder, header)

    def fingerprint(self) -> str:
        """A digest of the header and of the checksums of all rows: another one where anything is different.

        Reads 4 bytes a row. Stores without checksums count by the size and time of their files.

        Raises:
            UserError: the checksums are not those that the header counts.
        """
        found = Fingerprint("token store")
        found.add(asdict(self.header))
        for name, split in self.header.splits.items():
            if not self.header.checksums:
                found.add_file(rows_file(self.folder, name))
                continue
            file = checksums_file(self.folder, name)
            try:
                sums = read_file(file, split.rows * CHECKSUM.itemsize)
            except UnreadableError as error:
                raise UserError(f"{file} {error}; {_COPY_AGAIN}") from None
            if split.sums_crc32 is not None and split.sums_crc32 != zlib.crc32(sums):
                raise UserError(f"{file} is damaged or of another store (the header says so); {_COPY_AGAIN}")
            found.add_bytes(sums)
        return found.hexdigest()

    def split(self, name: str) -> StoreSplit:
        """The rows of one split.

        Raises:
            UserError: there is no such split.
        """
        if name not in self.header.splits:
            known = ", ".join(self.header.splits)
            raise UserError(f"{self.folder}: no split {name} in the token store, only {known}; {START_AGAIN}")
        return StoreSplit(self.folder, self.header, name)

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


class StoreSplit(StoredRows):
    """The rows of a split."""

    def __init__(self, folder: Path, header: Header, name: str) -> None:
        sums = checksums_file(folder, name) if header.checksums else None
        super().__init__(rows_file(folder, name), header, range(header.splits[name].rows), sums)
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
            raise UserError(f"{self._keys} has {len(found)} keys for {len(self)} rows; {_COPY_AGAIN}")
        return found

    def key(self, index: int) -> str:
        """The key of a row; reads the whole file, for its checksum. Raises as `keys` does."""
        self._require_whole()
        place = self.span[index]
        found = self._lines(place, place + 1)
        if not found:
            raise UserError(f"{self._keys} has no key for row {place}; {_COPY_AGAIN}")
        return found[0]

    def _lines(self, start: int, stop: int | None) -> list[str]:
        try:
            with self._keys.open(encoding="utf-8", newline="\n") as stream:
                return [line.rstrip("\n") for line in islice(stream, start, stop)]
        except OSError as error:
            raise UserError(f"{self._keys} {cannot_be_read(error)}; {_COPY_AGAIN}") from None
        except UnicodeDecodeError:
            raise UserError(f"{self._keys} is damaged, it is not UTF-8 text; {_COPY_AGAIN}") from None

    def _require_whole(self) -> None:
        """Compare the checksum of the keys, where the store has one."""
        try:
            require_file(self._keys, self._header.key_bytes)
            if self._header.keys_crc32 is None:
                return
            found = 0
            with self._keys.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    found = zlib.crc32(chunk, found)
        except UnreadableError as error:
            raise UserError(f"{self._keys} {error}; {_COPY_AGAIN}") from None
        except OSError as error:
            raise UserError(f"{self._keys} {cannot_be_read(error)}; {_COPY_AGAIN}") from None
        if found != self._header.keys_crc32:
            raise UserError(f"{self._keys} is damaged, its checksum is wrong; {_COPY_AGAIN}")


def _require_rows(file: Path, rows: int, size: int) -> None:
    try:
        found = require_file(file).st_size
    except UnreadableError as error:
        if not error.missing:
            raise UserError(f"{file} {error}; {_COPY_AGAIN}") from None
        found = 0
    if found != rows * size:
        raise UserError(
            f"{file} has {found} bytes, {HEADER} says {rows} rows of {size}; "
            "the file is truncated or of another store: copy it again or run task=tokenize again"
        )


def _identity(header: Header) -> dict[str, object]:
    """What must agree for a store to be gone on with."""
    values = {name: value for name, value in vars(header).items() if name not in ("splits", "complete", "checksums")}
    return values | {f"samples of {name}": split.source for name, split in header.splits.items()}


def _require_same(folder: Path, found: dict[str, object], wanted: dict[str, object]) -> None:
    for name in found | wanted:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{folder} holds a token store with {name} {found.get(name)}, this run has "
                f"{wanted.get(name)}; delete the folder or choose another run_dir"
            )


def _exists(file: Path) -> bool:
    try:
        return find(file) is not None
    except UnreadableError as error:
        raise UserError(f"{file} {error}; {START_AGAIN}") from None


def _cut(file: Path, size: int) -> None:
    """Take away what a killed writer added after the header was last replaced."""
    try:
        if _exists(file):
            require_file(file)
        with disk_full_named(file), open(file, "ab", opener=no_links) as stream:
            found = stream.tell()
            if found >= size:
                stream.truncate(size)
                os.fsync(stream.fileno())
    except UnreadableError as error:
        raise UserError(f"{file} {error}; {START_AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); {START_AGAIN}") from None
    if found < size:
        raise UserError(f"{file} has {found} bytes, {HEADER} says {size}: data were lost; {START_AGAIN}")
