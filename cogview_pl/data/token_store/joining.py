"""Joins the parts of a tokenisation into one token store, without copying rows.

The rows of each part become a piece of the joined store: a hard link, so that the store stays whole when the runs of
its parts are deleted. Where the parts lie on another disk, or links do not exist, the rows are copied. Header, keys and
checksums (some 25 bytes a row) are written anew, with the bytes that one process would have written.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cogview_pl.data.token_store.header import (
    SplitHeader,
    TokenStoreHeader,
    checksums_file,
    keys_file,
    piece_file,
    row_files,
    rows_file,
)
from cogview_pl.data.token_store.parts import Part
from cogview_pl.data.token_store.store import COPY_AGAIN, TokenStore
from cogview_pl.durable.read import unreadable_named
from cogview_pl.durable.write import replacing, sync_folder
from cogview_pl.errors import UserError

_CHUNK = 2**20  # bytes copied at once

_log = logging.getLogger(__name__)


def open_parts(folders: Sequence[Path]) -> list[TokenStore]:
    """The token stores of the parts of one tokenisation, in order.

    Args:
        folders: token stores, in any order.

    Raises:
        UserError: a part is missing, given twice, unfinished, or of another tokenisation.
    """
    stores = [TokenStore.open_part(folder) for folder in folders]
    if not stores:
        raise UserError("token_store.join names no parts; give the run folders of all of them")
    first = stores[0]
    by_number: dict[int, TokenStore] = {}
    for store in stores:
        part = _part(store)
        _require_agreement(first, store)
        if part.number in by_number:
            other = by_number[part.number].folder
            raise UserError(
                f"token_store.join: {store.folder} and {other} both hold part {part}; leave one of them out"
            )
        by_number[part.number] = store
    missing = [number for number in range(1, _part(first).count + 1) if number not in by_number]
    if missing:
        numbers = f"{', '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} missing"
        raise UserError(
            f"token_store.join: of the {_part(first).count} parts of {first.folder} and others, {numbers}; "
            "finish its run, and name its folder too"
        )
    ordered = [by_number[number] for number in sorted(by_number)]
    for name in first.header.splits:
        _require_no_gaps(ordered, name)
    return ordered


def join(stores: Sequence[TokenStore], folder: Path) -> TokenStoreHeader:
    """Write the joined token store into a folder; a join that was killed is done again from the beginning.

    Args:
        stores: of `open_parts`.
        folder: is made if it is missing.

    Raises:
        UserError: keys or checksums of a part are damaged, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {name: _join_split(stores, folder, name) for name in stores[0].header.splits}
    sync_folder(folder)
    header = replace(stores[0].header, splits=splits, part=None)
    header.save(folder)
    return header


def _join_split(stores: Sequence[TokenStore], folder: Path, name: str) -> SplitHeader:
    for old in (*folder.glob(f"{name}.*.bin"), rows_file(folder, name)):  # of a join that was killed
        old.unlink(missing_ok=True)
    joined = SplitHeader(_part(stores[0]).samples[name], keys_crc32=0, sums_crc32=0)
    keys, sums = keys_file(folder, name), checksums_file(folder, name)
    with replacing(keys) as keys_draft, replacing(sums) as sums_draft:
        for number, store in enumerate(stores, 1):
            (rows,) = row_files(store.folder, name)
            _link(rows, piece_file(folder, name, number, len(stores)))
            joined.keys_crc32 = _add_keys(store, name, keys_draft, joined.keys_crc32 or 0)
            with sums_draft.open("ab") as stream:
                for part in store.checksums(name):
                    stream.write(part)
                    joined.sums_crc32 = zlib.crc32(part, joined.sums_crc32 or 0)
            split = store.header.splits[name]
            joined.next += split.source
            joined.rows += split.rows
            joined.truncated += split.truncated
            joined.key_bytes += split.key_bytes
    return joined


def _add_keys(store: TokenStore, name: str, draft: Path, checksum: int) -> int:
    """Append the keys of a part to a file, and return the checksum of all of it; `checksum` is that of its content."""
    file, found = keys_file(store.folder, name), 0
    with draft.open("ab") as target:
        for chunk in _chunks(file):
            found = zlib.crc32(chunk, found)
            checksum = zlib.crc32(chunk, checksum)
            target.write(chunk)
    if found != store.header.splits[name].keys_crc32:
        raise UserError(f"{file} is damaged, its checksum is wrong; {COPY_AGAIN}")
    return checksum


def _chunks(file: Path) -> Iterator[bytes]:
    with unreadable_named(file, COPY_AGAIN), file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _link(rows: Path, piece: Path) -> None:
    try:
        os.link(rows, piece)
    except OSError as error:  # another disk, or a file system without links
        _log.info("%s is copied, it cannot be linked (%s)", rows, error.strerror)
        with replacing(piece) as draft, draft.open("wb") as target:
            target.writelines(_chunks(rows))


def _part(store: TokenStore) -> Part:
    if store.header.part is None:
        raise UserError(
            f"token_store.join: {store.folder} is no part of a token store, but a whole one; give the runs of "
            "task=tokenize with token_store.part"
        )
    return store.header.part


def _require_agreement(first: TokenStore, store: TokenStore) -> None:
    """Raises UserError that names what differs between two parts of one tokenisation."""
    for key, value in _common(store).items():
        wanted = _common(first)[key]
        if value != wanted:
            raise UserError(
                f"token_store.join: {store.folder} has {key} {value}, {first.folder} has {wanted}; they are parts of "
                "different token stores: make all parts from the same data with the same options"
            )


def _common(store: TokenStore) -> dict[str, object]:
    """What all parts of one tokenisation have in common."""
    part = _part(store)
    layout = {name: value for name, value in store.header.values().items() if name not in ("splits", "part")}
    samples = {f"samples of {name}": count for name, count in part.samples.items()}
    return {**layout, "parts": part.count, **samples, **part.inputs}


def _require_no_gaps(stores: Sequence[TokenStore], name: str) -> None:
    """Raises UserError if the samples of a part do not follow those of the one before."""
    done = 0
    for store in stores:
        part = _part(store)
        if part.first[name] != done:
            raise UserError(
                f"token_store.join: {store.folder} holds part {part}, and the parts before it end at sample {done} of "
                f"{name}; make all parts with the same data.batch_size"
            )
        done += store.header.splits[name].source
    if done != _part(stores[-1]).samples[name]:
        raise UserError(
            f"token_store.join: {stores[-1].folder} ends at sample {done} of {_part(stores[-1]).samples[name]} of "
            f"{name}; make all parts with the same data.batch_size"
        )
