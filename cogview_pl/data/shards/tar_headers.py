"""The members of a tar file, read from its headers in bounded time and memory.

A damaged or hostile file makes Python's `tarfile` follow sizes backwards, read names of gigabytes and search them in
quadratic time. Here each header comes after the one before it, so the size of the file limits their number, and names
and pax headers have limits. The formats v7, ustar, GNU and pax are read.

Headers of usual files are read in batches, and numpy adds up their checksums. Any other header is read by itself.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cogview_pl.durable.read import require_file
from cogview_pl.errors.signals import SIGNALS

MAX_NAME = 2**16
"""Longest name of a member, in bytes."""
MAX_RECORDS = 2**20
"""Largest size of a pax header in bytes."""
BLOCK = 512
"""Bytes of a header; data begin at multiples of it."""

_END = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7", b"S")
_LINKS = (b"1", b"2")
_WITHOUT_DATA = (*_LINKS, b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever size they say
_LONG_NAME, _LONG_LINK, _GLOBAL, _PAX, _SPARSE = b"L", b"K", b"g", (b"x", b"X"), b"S"
_MORE_HOLES, _STILL_MORE_HOLES = 482, 504  # bytes that are not zero where a block with places of holes follows
_ZEROS_AT_ONCE = 2**20  # bytes in which the next tar file is looked for after the end of one
_DIGITS = 20  # of a size in a pax record, at most
_PATH, _SIZE, _SPARSE_NAME = b"path", b"size", b"GNU.sparse.name"
_SPARSE_RECORD = b"sparse"  # what stands for all pax records that only sparse members have
_AT_ONCE = 2048  # headers of a batch
_WITH_PAX = 3 * BLOCK  # bytes of a pax header, its records and the header of its member
_USUAL_KIND, _USUAL_ENDS = ord("0"), b"\0 "  # kind of a usual file, and what follows the digits of its size
_OCTAL = 8 ** np.arange(5, -1, -1)  # what the six digits of a usual checksum count
_CHECKSUM = slice(148, 156)


class Span(NamedTuple):
    """The bytes of a member in its shard."""

    offset: int
    size: int


NO_MEMBER = Span(-1, 0)
SPARSE_MEMBER = Span(-2, 0)
"""Place of a sparse file: the shard stores it without its holes, so it is not read."""
SEVERAL_IMAGES = Span(-3, 0)
"""Place of an image where several members could be the image of a sample."""
LINK = Span(-4, 0)
"""Place of a link."""

Member = tuple[bytes, int, int]
"""Name, and offset and size as in `Span`."""


class DamagedError(Exception):
    """The header at byte `at` is damaged; the text says why."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at


class _Header(NamedTuple):
    kind: bytes
    size: int
    name: bytes


def members(path: Path) -> Iterator[list[Member]]:
    """The regular files and links of a tar file in batches, in their order.

    Tar files that were joined (`cat a.tar b.tar`) are read to the end.

    Raises:
        UnreadableError, OSError: the file cannot be read.
        DamagedError: the file is no tar file, is compressed, ends early, has a member that is not within it, or goes on
            after the end of the tar file with other data. The members before it have been yielded.
    """
    require_file(path)
    with path.open("rb") as stream:
        file = stream.fileno()
        end = os.fstat(file).st_size
        at: int | None = 0
        while at is not None:
            SIGNALS.check()
            usual, at = _usual_members(file, at, end)
            if usual:
                yield usual
            others, at = _other_member(file, at, end)
            if others:
                yield others


def _usual_members(file: int, at: int, end: int) -> tuple[list[Member], int]:
    """Members from a place on whose headers are those of usual files, and the place after them.

    A small pax header may come before a header: webdataset writes one for the time of each member.
    """
    blocks: list[bytes] = []
    found: list[Member] = []
    places, num_blocks = [at], []  # after each member
    ahead = BLOCK
    while len(blocks) < _AT_ONCE:
        block = os.pread(file, ahead, at)
        name, start = b"", at + BLOCK
        if block[156:157] == b"x" and ahead < _WITH_PAX:
            ahead = _WITH_PAX
            continue
        if block[156:157] == b"x":
            name_of_pax = _small_pax(block, at)
            if name_of_pax is None:
                break
            blocks.append(block[:BLOCK])
            name, start, block = name_of_pax, at + _WITH_PAX, block[2 * BLOCK :]
        block = block[:BLOCK]
        size = _usual_size(block)
        if size is None or start + size > end:
            break
        blocks.append(block)
        found.append((name or _name(block), start, size))
        at = start + (size + BLOCK - 1) // BLOCK * BLOCK
        places.append(at)
        num_blocks.append(len(blocks))
    right = bisect_right(num_blocks, _first_wrong(blocks))
    return found[:right], places[right]


def _usual_size(block: bytes) -> int | None:
    """Size in the header of a usual file; None for another header."""
    if len(block) < BLOCK or block[156] != _USUAL_KIND or block[135] not in _USUAL_ENDS:
        return None
    try:
        size = int(block[124:135], 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def _small_pax(data: bytes, at: int) -> bytes | None:
    """The name in a pax header of one block, empty where it gives none; None for a header that does more."""
    try:
        size = int(data[124:135], 8)
        if len(data) < _WITH_PAX or not 0 <= size <= BLOCK or data[135] not in _USUAL_ENDS:
            return None
        given = _records(data[BLOCK : BLOCK + size], at)
    except (ValueError, DamagedError):  # reading this header by itself says why
        return None
    return given.get(_PATH, b"") if given.keys() <= {_PATH} else None


def _first_wrong(blocks: list[bytes]) -> int:
    """Number of headers before the first one whose checksum is wrong or written in an unusual form."""
    if not blocks:
        return 0
    headers = np.frombuffer(b"".join(blocks), dtype=np.uint8).reshape(-1, BLOCK)
    field = headers[:, _CHECKSUM]
    digits = field[:, :6] - ord("0")  # wraps around below 0
    totals = headers.sum(axis=1, dtype=np.int64) - field.sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    right = (digits < 8).all(axis=1) & (field[:, 6] == 0) & (digits @ _OCTAL == totals)
    return len(blocks) if right.all() else int(right.argmin())


def _other_member(file: int, at: int, end: int) -> tuple[list[Member], int | None]:
    """The member at a place, if it is one, and the place after it; None at the end."""
    given: dict[bytes, bytes] = {}  # fields of the member from GNU and pax headers before it
    while True:
        SIGNALS.check()
        block = _read(file, at, BLOCK, at)
        if block == _END and not given:
            joined = _next_data(file, at + BLOCK, end)
            if joined is None:
                return [], None
            at = joined
            block = _read(file, at, BLOCK, at)
            _require_tar(block, at)
        header = _parse(block, at)
        start = at + BLOCK
        size = header.size
        belongs = header.kind in (_LONG_NAME, _LONG_LINK, _GLOBAL, *_PAX)
        if not belongs:
            size = _size(given, header, at)
            if header.kind == _SPARSE:
                start = _after_holes(file, block, start, at)
        if start + size > end:
            raise DamagedError(at, f"a member of {size:,} bytes goes beyond the end of the file")
        after = start + -(-size // BLOCK) * BLOCK
        if not belongs:
            return _places(header, given, Span(start, size), at), after
        if header.kind == _LONG_NAME:
            _require_short(size, MAX_NAME, at)
            given = {_PATH: _text(_read(file, start, size, at))} | given  # the first of two is the outer one
        elif header.kind in _PAX:
            _require_short(size, MAX_RECORDS, at)
            given = _records(_read(file, start, size, at), at) | given
        elif not given:
            return [], after
        at = after


def _places(header: _Header, given: dict[bytes, bytes], place: Span, at: int) -> list[Member]:
    """The member with its name, if it is a file or a link."""
    if header.kind in _LINKS:
        return [(given.get(_PATH) or header.name, *LINK)]
    if header.kind not in _FILES:
        return []
    name = given.get(_SPARSE_NAME) or given.get(_PATH) or header.name
    _require_short(len(name), MAX_NAME, at)
    sparse = header.kind == _SPARSE or _SPARSE_RECORD in given or _SPARSE_NAME in given
    return [(name, *(SPARSE_MEMBER if sparse else place))]


def _next_data(file: int, at: int, end: int) -> int | None:
    """The next block that is not zero, from the end of a tar file on: another one may be joined to it."""
    while at < end:
        SIGNALS.check()
        try:
            at = os.lseek(file, at, os.SEEK_DATA) // BLOCK * BLOCK  # a hole may have terabytes
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return None
            raise
        data = os.pread(file, _ZEROS_AT_ONCE, at)
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data) or not data:
            return at + zeros // BLOCK * BLOCK
        at += zeros
    return None


def _require_tar(block: bytes, at: int) -> None:
    try:
        _parse(block, at)
    except DamagedError:
        raise DamagedError(at, "what follows the end of the tar file is no tar file") from None


def _parse(block: bytes, at: int) -> _Header:
    """The fields of a header."""
    found = _number(block[_CHECKSUM], at)
    # The checksum field counts as blanks. Some old programs summed signed bytes.
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if found != total and found != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise DamagedError(at, "no header with a right checksum")
    kind, name = block[156:157], _name(block)
    if kind == b"\0" and name.endswith(b"/"):  # a folder, as v7 has it
        kind = b"5"
    return _Header(kind, _number(block[124:136], at), name)


def _name(block: bytes) -> bytes:
    name = _text(block[:100])
    return b"%b/%b" % (_text(block[345:500]), name) if block[345] and block[257:263] == b"ustar\0" else name


def _size(given: dict[bytes, bytes], header: _Header, at: int) -> int:
    """Size of the data after the header of a member."""
    if header.kind in _WITHOUT_DATA:
        return 0
    if _SIZE not in given:
        return header.size
    digits = given[_SIZE]
    if not (digits.isdigit() and len(digits) <= _DIGITS):
        raise DamagedError(at, "a size that is no number")
    return int(digits)


def _after_holes(file: int, block: bytes, start: int, at: int) -> int:
    """Start of the data of a sparse member of GNU tar: after the blocks that list its holes."""
    more = block[_MORE_HOLES]
    while more:
        more = _read(file, start, BLOCK, at)[_STILL_MORE_HOLES]
        start += BLOCK
    return start


def _records(data: bytes, at: int) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header that describe the next member."""
    found = {}
    place = 0
    while place < len(data) and data[place]:
        blank = data.find(b" ", place, place + _DIGITS)
        digits = data[place:blank] if blank > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = data[place : place + length]
        key, equals, value = record[blank + 1 - place : -1].partition(b"=")
        if not (equals and record.endswith(b"\n") and len(record) == length):
            raise DamagedError(at, "a pax header that cannot be read")
        if key.startswith(b"GNU.sparse.") and key != _SPARSE_NAME:
            found[_SPARSE_RECORD] = b""
        elif key in (_PATH, _SIZE, _SPARSE_NAME):
            found[key] = value.rstrip(b"/")
        place += length
    return found


def _number(field: bytes, at: int) -> int:
    """A number in octal digits, or in base 256 after the byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise DamagedError(at, "a number that cannot be read")
    return number


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _require_short(size: int, limit: int, at: int) -> None:
    if size > limit:
        raise DamagedError(at, f"a name or a pax header of {size:,} bytes, at most {limit:,} are read")


def _read(file: int, offset: int, size: int, at: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise DamagedError(at, "the file ends early")
    return data
