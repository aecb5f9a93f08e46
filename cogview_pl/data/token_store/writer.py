"""Writes a token store (`store.py`). A writer that was killed continues where the header says."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from cogview_pl.data.token_store.header import (
    HEADER,
    START_AGAIN,
    SplitHeader,
    TokenStoreHeader,
    checksums_file,
    keys_file,
    row_files,
    rows_file,
)
from cogview_pl.data.token_store.parts import Part
from cogview_pl.data.token_store.rows import CHECKSUM, NATIVE, flat_ids
from cogview_pl.durable.read import UnreadableError, find, require_file, unreadable_named
from cogview_pl.durable.write import append, disk_full_named, no_links
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

_MOST_WAITING = 2**24  # bytes of rows that wait for a commit


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
        image_fields: names of its further images.
        cut: gives the text token ids to keep of a longer text, from its ids and the largest number.
        part: the part of the data set that the store holds; `splits` and indices count its samples. None: all of it.
        commit_seconds: least time between two commits, unless many bytes wait; a kill loses what was not committed.

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
        image_fields: Sequence[str] = (),
        cut: Callable[[Sequence[int], int], Sequence[int]] = lambda ids, length: ids[:length],
        part: Part | None = None,
        commit_seconds: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        self._cut_text = cut
        self._commit_seconds = commit_seconds
        self._committed = time.monotonic()
        self._waiting: dict[Path, list[bytes]] = {}
        self._waiting_bytes = 0
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
            image_fields=tuple(image_fields),
            checksums=True,
            part=part,
        )
        if _exists(self.folder / HEADER):
            found = TokenStoreHeader.load(self.folder)
            _require_same(self.folder, _identity(found), _identity(self.header))
            self.header = found
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.header.save(self.folder)
        for name, split in self.header.splits.items():
            if row_files(self.folder, name) == [rows_file(self.folder, name)]:  # else joined, and never written again
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
        others: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Add rows. They are on disk at the next commit, which this call makes when one is due.

        Args:
            split: its name.
            text_tokens: for each text field the text token ids of B samples, of any length.
            codes: integers `(B, y, x)`. B may be 0, if all samples were skipped.
            keys: of the B samples.
            next_index: number of samples done so far, with the skipped ones.
            large: codes `(B, 2y, 2x)` of the same images at twice the size, if the store holds them.
            others: codes `(B, y, x)` of the further images by name, if the store holds any.

        Raises:
            ValueError: sizes or ids do not fit the header, or the store is complete.
            UserError: a commit finds no space on the disk.
        """
        now = self.header.splits[split]
        if self.header.complete:
            raise ValueError("the store is complete")
        if not now.next + len(keys) <= next_index <= now.source:
            raise ValueError(f"next_index={next_index}: {now.next} done, {len(keys)} new, of {now.source}")
        self._check_ids(text_tokens, codes, large, others, len(keys))
        names = "".join(key.replace("\n", " ") + "\n" for key in keys).encode("utf-8", "backslashreplace")
        length = self.header.text_length
        kept = {name: [self._cut_text(ids, length) for ids in texts] for name, texts in text_tokens.items()}
        rows = self.header.pack(kept, codes, large, others)
        self._wait(rows_file(self.folder, split), rows.tobytes())
        self._wait(keys_file(self.folder, split), names)
        if self.header.checksums:
            sums = np.array([zlib.crc32(row) for row in rows], CHECKSUM).tobytes()
            self._wait(checksums_file(self.folder, split), sums)
            if now.sums_crc32 is not None:
                now.sums_crc32 = zlib.crc32(sums, now.sums_crc32)
        now.next = next_index
        now.rows += len(keys)
        texts = zip(*text_tokens.values(), strict=True)
        now.truncated += sum(any(len(ids) > length for ids in sample) for sample in texts)
        now.key_bytes += len(names)
        if now.keys_crc32 is not None:
            now.keys_crc32 = zlib.crc32(names, now.keys_crc32)
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes > _MOST_WAITING or time.monotonic() - self._committed >= self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Write what waits, then the header that counts it; the rows so far are on disk when this returns.

        Raises:
            UserError: no space is left on the disk.
        """
        waiting, self._waiting = self._waiting, {}  # after a failure nothing is written twice
        self._waiting_bytes = 0
        if not waiting:
            return
        for file, parts in waiting.items():
            append(file, b"".join(parts))
        self.header.save(self.folder)
        self._committed = time.monotonic()

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Commit, also when an error or a signal ends the block."""
        self.commit()

    def _wait(self, file: Path, data: bytes) -> None:
        self._waiting.setdefault(file, []).append(data)

    def finish(self) -> None:
        """Declare the store complete.

        Raises:
            ValueError: source samples are left.
        """
        for name, split in self.header.splits.items():
            if split.next != split.source:
                raise ValueError(f"split {name}: {split.next} of {split.source} samples are done")
        self.commit()
        self.header.complete = True
        self.header.save(self.folder)

    def _check_ids(
        self,
        text_tokens: Mapping[str, Sequence[Sequence[int]]],
        codes: torch.Tensor,
        large: torch.Tensor | None,
        others: Mapping[str, torch.Tensor],
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
        if tuple(others) != header.image_fields or any(grid.shape != codes.shape for grid in others.values()):
            raise ValueError(f"image_fields={header.image_fields}: {[(n, tuple(g.shape)) for n, g in others.items()]}")
        for grid in (codes, *others.values(), *([] if large is None else [large])):
            if grid.numel() and not 0 <= int(grid.min()) <= int(grid.max()) < header.codebook_size:
                raise ValueError(f"codes must be in [0, {header.codebook_size})")
        ids = flat_ids(chain.from_iterable(text_tokens.values()))
        if len(ids) and not 0 <= ids.min() <= ids.max() < header.text_vocab_size:
            raise ValueError(f"text tokens must be in [0, {header.text_vocab_size})")


def _identity(header: TokenStoreHeader) -> dict[str, object]:
    """The values that must be equal for a writer to continue a store."""
    values = {name: value for name, value in vars(header).items() if name not in ("splits", "complete", "checksums")}
    values["part"] = None if header.part is None else str(header.part)  # a run compares its inputs itself
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
