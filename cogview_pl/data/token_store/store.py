"""Token store: a data set as text tokens and image codes on disk, written once by `task=tokenize`.

A token store is a folder:

- `header.json`: sizes, tokenizers and the progress of the writer. It is replaced after the rows are on disk, so it
  never counts a row that is not there.
- `SPLIT.bin`: the rows (`rows.py`), in one of two formats.
- `SPLIT.keys.txt`: the key of each row, one per line; its checksum is in the header.
- `SPLIT.crc32`: the checksum of each row, uint32. Stores of earlier versions have none.

A writer that was killed continues where the header says, and ends with the same bytes as one that was not killed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from cogview_pl.data.fingerprint import Fingerprint
from cogview_pl.data.token_store.header import (
    HEADER,
    START_AGAIN,
    SplitHeader,
    TokenStoreHeader,
    checksums_file,
    keys_file,
    rows_file,
)
from cogview_pl.data.token_store.rows import CHECKSUM, NATIVE, TokenRows
from cogview_pl.durable.read import UnreadableError, find, read_file, require_file, unreadable_named
from cogview_pl.durable.write import append, disk_full_named, no_links
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

_COPY_AGAIN = "copy the token store again or run task=tokenize again"
_CHUNK = 2**20  # bytes of a file of keys read at once


class TokenStoreWriter:
    """Writes a token store, or continues an unfinished one in the same folder.

    Args:
        folder: is made if it is missing.
        text_length: text tokens per text field in a row; longer texts are cut, and their rows counted in the header.
        grid: `(y, x)` of the codes.
        text_vocab_size, codebook_size: sizes of the two vocabularies.
        text_tokenizer, image_tokenizer: identities, which `TokenStore.require` compares.
        splits: number of samples of the data set by split.
        format: of the rows, `native` or `cogview`.
        large: whether rows hold the codes of the image at twice the size as well.
        text_fields: names of the texts of a sample.
        cut: gives the text token ids to keep of a longer text, from its ids and the largest number.

    Raises:
        UserError: the folder holds a store with other sizes or identities, or a store that has lost data or cannot be
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
        text_fields: Sequence[str] = (CAPTION,),
        cut: Callable[[Sequence[int], int], Sequence[int]] = lambda ids, length: ids[:length],
    ) -> None:
        self.folder = Path(folder)
        self._cut_text = cut
        self.header = TokenStoreHeader(
            text_length=text_length,
            grid=(grid[0], grid[1]),
            text_vocab_size=text_vocab_size,
            codebook_size=codebook_size,
            text_tokenizer=text_tokenizer,
            image_tokenizer=image_tokenizer,
            splits={name: SplitHeader(source) for name, source in splits.items()},
            format=format,
            large=large,
            text_fields=tuple(text_fields),
            checksums=True,
        )
        if _exists(self.folder / HEADER):
            found = TokenStoreHeader.load(self.folder)
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
        """Index of the next sample to tokenise; the size of the data set when the split is done."""
        return self.header.splits[split].next

    def append(
        self,
        split: str,
        text_tokens: Mapping[str, Sequence[Sequence[int]]],
        codes: torch.Tensor,
        keys: Sequence[str],
        next_index: int,
        large: torch.Tensor | None = None,
    ) -> None:
        """Add rows; they are on disk when this returns.

        Args:
            split: its name.
            text_tokens: for each text field the text token ids of B samples, of any length.
            codes: integers `(B, y, x)`. B may be 0, if all samples were skipped.
            keys: of the B samples.
            next_index: number of samples done so far, with the skipped ones.
            large: codes `(B, 2y, 2x)` of the same images at twice the size, if the store holds them.

        Raises:
            ValueError: sizes or ids do not fit the header, or the store is complete.
        """
        now = self.header.splits[split]
        if self.header.complete:
            raise ValueError("the store is complete")
        if not now.next + len(keys) <= next_index <= now.source:
            raise ValueError(f"next_index={next_index}: {now.next} done, {len(keys)} new, of {now.source}")
        self._check_ids(text_tokens, codes, large, len(keys))
        names = "".join(key.replace("\n", " ") + "\n" for key in keys).encode("utf-8", "backslashreplace")
        length = self.header.text_length
        kept = {name: [self._cut_text(ids, length) for ids in texts] for name, texts in text_tokens.items()}
        rows = self.header.pack(kept, codes, large)
        append(rows_file(self.folder, split), rows.tobytes())
        append(keys_file(self.folder, split), names)
        if self.header.checksums:
            sums = np.array([zlib.crc32(row.tobytes()) for row in rows], CHECKSUM)
            append(checksums_file(self.folder, split), sums.tobytes())
            if now.sums_crc32 is not None:
                now.sums_crc32 = zlib.crc32(sums.tobytes(), now.sums_crc32)
        now.next = next_index
        now.rows += len(keys)
        texts = zip(*text_tokens.values(), strict=True)
        now.truncated += sum(any(len(ids) > self.header.text_length for ids in sample) for sample in texts)
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
        self,
        text_tokens: Mapping[str, Sequence[Sequence[int]]],
        codes: torch.Tensor,
        large: torch.Tensor | None,
        num_rows: int,
    ) -> None:
        header = self.header
        if tuple(text_tokens) != header.text_fields:
            raise ValueError(f"texts {', '.join(text_tokens)}, the store has {', '.join(header.text_fields)}")
        num_texts = next((len(texts) for texts in text_tokens.values() if len(texts) != num_rows), num_rows)
        if codes.shape != (num_rows, *header.grid) or num_texts != num_rows:
            raise ValueError(f"{num_rows} keys, {num_texts} texts, codes {tuple(codes.shape)} do not fit")
        if header.large != (large is not None) or (large is not None and large.shape != (num_rows, *header.large_grid)):
            raise ValueError(f"large={header.large}: large codes {None if large is None else tuple(large.shape)}")
        for grid in (codes,) if large is None else (codes, large):
            if grid.numel() and not 0 <= int(grid.min()) <= int(grid.max()) < header.codebook_size:
                raise ValueError(f"codes must be in [0, {header.codebook_size})")
        ids = (text_token for texts in text_tokens.values() for text in texts for text_token in text)
        if any(not 0 <= text_token < header.text_vocab_size for text_token in ids):
            raise ValueError(f"text tokens must be in [0, {header.text_vocab_size})")


class TokenStore:
    """A finished token store, read-only. Open it with `TokenStore.open`."""

    def __init__(self, folder: Path, header: TokenStoreHeader) -> None:
        self.folder = folder
        self.header = header

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Check the header and the sizes of the files; reads no rows.

        Raises:
            UserError: no store, an unfinished or damaged one, or one of another version.
        """
        folder = Path(folder)
        header = TokenStoreHeader.load(folder)
        if not header.complete:
            raise UserError(f"{folder}: the token store was not finished; run task=tokenize resume=true")
        for name, split in header.splits.items():
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
        found.add(asdict(self.header))
        for name, split in self.header.splits.items():
            if not self.header.checksums:
                found.add_file(rows_file(self.folder, name))
                continue
            file = checksums_file(self.folder, name)
            with unreadable_named(file, _COPY_AGAIN):
                sums = read_file(file, split.rows * CHECKSUM.itemsize)
            if split.sums_crc32 is not None and split.sums_crc32 != zlib.crc32(sums):
                raise UserError(f"{file} is damaged or of another store (the header says so); {_COPY_AGAIN}")
            found.add_bytes(sums)
        return found.hexdigest()

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
        """The key of a row. Reads the whole file for its checksum; raises as `keys` does."""
        self._require_whole()
        place = self.span[index]
        found = self._lines(place, place + 1)
        if not found:
            raise UserError(f"{self._keys} has no key for row {place}; {_COPY_AGAIN}")
        return found[0]

    def _lines(self, start: int, stop: int | None) -> list[str]:
        try:
            with (
                unreadable_named(self._keys, _COPY_AGAIN),
                self._keys.open(encoding="utf-8", newline="\n") as stream,
            ):
                return [line.rstrip("\n") for line in islice(stream, start, stop)]
        except UnicodeDecodeError:
            raise UserError(f"{self._keys} is damaged, it is not UTF-8 text; {_COPY_AGAIN}") from None

    def _require_whole(self) -> None:
        """Compare the checksum of the keys, if the store has one."""
        with unreadable_named(self._keys, _COPY_AGAIN):
            require_file(self._keys, self._header.key_bytes)
            if self._header.keys_crc32 is None:
                return
            found = 0
            with self._keys.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    found = zlib.crc32(chunk, found)
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


def _identity(header: TokenStoreHeader) -> dict[str, object]:
    """The values that must be equal for a writer to continue a store."""
    values = {name: value for name, value in vars(header).items() if name not in ("splits", "complete", "checksums")}
    return values | {f"samples of {name}": split.source for name, split in header.splits.items()}


def _require_same(folder: Path, found: dict[str, object], wanted: dict[str, object]) -> None:
    for name in found | wanted:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{folder} holds a token store with {name} {found.get(name)}, this run has "
                f"{wanted.get(name)}; go on with that one, or start anew in another run_dir"
            )


def _exists(file: Path) -> bool:
    with unreadable_named(file, START_AGAIN):
        return find(file) is not None


def _cut(file: Path, size: int) -> None:
    """Remove what a killed writer has added since the header was last replaced."""
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
