"""The places of the members of a tar file, read from its headers in bounded time and memory.

A damaged or hostile file makes Python's `tarfile` follow sizes backwards, read names of gigabytes and search them in
quadratic time. Here each header comes after the one before it, so the size of the file limits their number, and names
and pax headers have limits. The formats v7, ustar, GNU and pax are read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cogview_pl.data.left_out import LeftOut
from cogview_pl.data.progress import Progress
from cogview_pl.durable.read import UnreadableError, cannot_be_read, require_file
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS

MAX_NAME = 2**16
"""Longest name of a member, in bytes."""
MAX_RECORDS = 2**20
"""Largest size of a pax header in bytes."""
MEBIBYTE = 2**20

_BLOCK = 512
_END = bytes(_BLOCK)
_FILES = (b"0", b"\0", b"7", b"S")
_LINKS = (b"1", b"2")
_WITHOUT_DATA = (*_LINKS, b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever size they say
_LONG_NAME, _LONG_LINK, _GLOBAL, _PAX, _SPARSE = b"L", b"K", b"g", (b"x", b"X"), b"S"
_MORE_HOLES, _STILL_MORE_HOLES = 482, 504  # bytes that are not zero where a block with places of holes follows
_ZEROS_AT_ONCE = 2**20  # bytes in which the next tar file is looked for after the end of one
_DIGITS = 20  # of a size in a pax record, at most
_SPARSE_RECORD = "sparse"  # what stands for all pax records that only sparse members have


class Span(NamedTuple):
    """The bytes of a member in its shard."""

    offset: int
    size: int


NO_MEMBER = Span(-1, 0)
SPARSE_MEMBER = Span(-2, 0)
"""Place of a sparse file: the shard stores it without its holes, so it is not read."""
SEVERAL_IMAGES = Span(-3, 0)
"""Place of an image where several members could be the image of a sample."""
_LINK = Span(-4, 0)


class _DamagedError(Exception):
    """The header at byte `at` is damaged; the text says why."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at


class _Header(NamedTuple):
    kind: bytes
    size: int
    name: str


def index_shard(
    path: Path, left_out: LeftOut | None = None, progress: Progress | None = None
) -> dict[str, dict[str, Span]]:
    """The place of each member by the parts of its base name before and after the first dot, in the order of the file.

    Reads the headers only. The last extension is in lower case. Of two members with the same name the later counts, as
    it does when a tar file is unpacked. Tar files that were joined (`cat a.tar b.tar`) are read to the end.

    Args:
        path: the tar file.
        left_out: counts the members that have no place in the result.
        progress: is told of each `MEBIBYTE` that has been passed.

    Raises:
        UserError: the file is no tar file, is compressed, ends early, has a member that is not within it, or goes on
            after the end of the tar file with other data.
    """
    samples: dict[str, dict[str, Span]] = {}
    left_out = LeftOut() if left_out is None else left_out
    passed = 0
    try:
        require_file(path)
        with path.open("rb") as stream:
            for name, place in _members(stream.fileno()):
                folder, slash, base = name.rpartition("/")
                stem, dot, rest = base.partition(".")
                if place == _LINK:
                    left_out.add("links", name)
                elif not stem and dot:
                    left_out.add("hidden files", name)
                elif not dot:
                    left_out.add("without an extension", name)
                else:
                    members = samples.setdefault(folder + slash + stem, {})
                    rest = _lower_extension(rest)
                    if rest in members:
                        left_out.add("earlier members of a name that appears twice", name)
                    members[rest] = place
                if progress is not None and place.offset // MEBIBYTE > passed:
                    progress.update(place.offset // MEBIBYTE - passed)
                    passed = place.offset // MEBIBYTE
    except UnreadableError as error:
        raise UserError(f"{path} {error}; give a tar file, or leave it out of data.urls") from None
    except OSError as error:
        raise UserError(f"{path} {cannot_be_read(error)}; see to it, or leave it out of data.urls") from None
    except _DamagedError as error:
        if error.at == 0:
            raise UserError(
                f"{path} is not an uncompressed tar file or is cut off ({error}); "
                "unpack it if it is compressed, otherwise fetch it again or leave it out of data.urls"
            ) from None
        raise UserError(
            f"{path} is cut off or damaged at byte {error.at} ({len(samples)} samples before it): {error}; "
            "fetch or write it again, or leave it out of data.urls"
        ) from None
    return samples


def _members(file: int) -> Iterator[tuple[str, Span]]:
    """Names and places of the regular files; raises _DamagedError for damaged headers."""
    end = os.fstat(file).st_size
    at = 0
    given: dict[str, str] = {}  # fields of the next member from GNU and pax headers
    while True:
        SIGNALS.check()
        block = _read(file, at, _BLOCK, at)
        if block == _END and not given:
            joined = _next_data(file, at + _BLOCK, end)
            if joined is None:
                return
            at = joined
            block = _read(file, at, _BLOCK, at)
            _require_tar(block, at)
        header = _parse(block, at)
        start = at + _BLOCK
        size = header.size
        belongs = header.kind in (_LONG_NAME, _LONG_LINK, _GLOBAL, *_PAX)
        if not belongs:
            size = _size(given, header, at)
            if header.kind == _SPARSE:
                start = _after_holes(file, block, start, at)
        if start + size > end:
            raise _DamagedError(at, f"a member of {size:,} bytes goes beyond the end of the file")
        if header.kind == _LONG_NAME:
            _require_short(size, MAX_NAME, at)
            given = {"path": _text(_read(file, start, size, at))} | given  # the first of two is the outer one
        elif header.kind in _PAX:
            _require_short(size, MAX_RECORDS, at)
            given = _records(_read(file, start, size, at), at) | given
        elif not belongs:
            if header.kind in _FILES:
                sparse = header.kind == _SPARSE or _SPARSE_RECORD in given or "GNU.sparse.name" in given
                name = given.get("GNU.sparse.name") or given.get("path") or header.name
                _require_short(len(name), MAX_NAME, at)
                yield name, SPARSE_MEMBER if sparse else Span(start, size)
            elif header.kind in _LINKS:
                yield given.get("path") or header.name, _LINK
            given = {}
        at = start + -(-size // _BLOCK) * _BLOCK


def _next_data(file: int, at: int, end: int) -> int | None:
    """The next block that is not zero, from the end of a tar file on: another one may be joined to it."""
    while at < end:
        SIGNALS.check()
        try:
            at = os.lseek(file, at, os.SEEK_DATA) // _BLOCK * _BLOCK  # a hole may have terabytes
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return None
            raise
        data = os.pread(file, _ZEROS_AT_ONCE, at)
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data) or not data:
            return at + zeros // _BLOCK * _BLOCK
        at += zeros
    return None


def _require_tar(block: bytes, at: int) -> None:
    try:
        _parse(block, at)
    except _DamagedError:
        raise _DamagedError(at, "what follows the end of the tar file is no tar file") from None


def _parse(block: bytes, at: int) -> _Header:
    """The fields of a header."""
    found = _number(block[148:156], at)
    # The checksum field counts as blanks. Some old programs summed signed bytes.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if found != total and found != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise _DamagedError(at, "no header with a right checksum")
    kind, name = block[156:157], _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    if kind == b"\0" and name.endswith("/"):  # a folder, as v7 has it
        kind = b"5"
    return _Header(kind, _number(block[124:136], at), name)


def _size(given: dict[str, str], header: _Header, at: int) -> int:
    """Size of the data after the header of a member."""
    if header.kind in _WITHOUT_DATA:
        return 0
    if "size" not in given:
        return header.size
    digits = given["size"]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS):
        raise _DamagedError(at, "a size that is no number")
    return int(digits)


def _after_holes(file: int, block: bytes, start: int, at: int) -> int:
    """Start of the data of a sparse member of GNU tar: after the blocks that list its holes."""
    more = block[_MORE_HOLES]
    while more:
        more = _read(file, start, _BLOCK, at)[_STILL_MORE_HOLES]
        start += _BLOCK
    return start


def _records(data: bytes, at: int) -> dict[str, str]:
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
            raise _DamagedError(at, "a pax header that cannot be read")
        if key.startswith(b"GNU.sparse.") and key != b"GNU.sparse.name":
            found[_SPARSE_RECORD] = ""
        elif key in (b"path", b"size", b"GNU.sparse.name"):
            found[_text(key)] = value.decode("utf-8", "surrogateescape").rstrip("/")
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
        raise _DamagedError(at, "a number that cannot be read")
    return number


def _lower_extension(rest: str) -> str:
    """What follows the first dot of a name, with the part after the last dot in lower case."""
    middle, dot, extension = rest.rpartition(".")
    return middle + dot + extension.lower()


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _require_short(size: int, limit: int, at: int) -> None:
    if size > limit:
        raise _DamagedError(at, f"a name or a pax header of {size:,} bytes, at most {limit:,} are read")


def _read(file: int, offset: int, size: int, at: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise _DamagedError(at, "the file ends early")
    return data
