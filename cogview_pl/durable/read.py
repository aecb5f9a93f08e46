"""Reads files that a user names. The kind of a file is checked before it is opened, and its size is limited.

Opening a named pipe could wait forever, and a device can have any size. A file without permission counts as
unreadable, not as missing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cogview_pl.errors import UserError

MAX_CAPTION = 2**20
"""Largest caption file (`.txt` or `.json`) in bytes, and largest line of a list in characters."""
MAX_IMAGE = 2**28
"""Largest image file in bytes; images that Pillow accepts are far smaller."""

_MISSING = (errno.ENOENT, errno.ENOTDIR)
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnreadableError(Exception):
    """A file cannot be used; the text gives the reason, and is printed after the name of the file."""

    missing = False
    """Whether the file does not exist."""


def find(path: str | Path) -> os.stat_result | None:
    """Status of the file at a path, with links followed; None if it does not exist.

    Raises:
        UnreadableError: the status cannot be read.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise UnreadableError(cannot_be_read(error)) from None
    except ValueError:  # a zero byte or a lone surrogate
        raise UnreadableError("has no name that a file can have") from None


def why_unusable(path: str | Path) -> str:
    """Words for a message, after the name of an unsuitable path: `does not exist`, `is a folder`, or an error."""
    try:
        found = find(path)
    except UnreadableError as error:
        return str(error)
    return "does not exist" if found is None else f"is {kind_of(found)}"


def kind_of(found: os.stat_result) -> str:
    """Kind of a file in words: `a file`, `a folder`, `a named pipe`, …"""
    return next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")


def require_file(path: str | Path, limit: int | None = None) -> os.stat_result:
    """Check that a path is a regular file, without opening it.

    Args:
        path: the file.
        limit: largest size in bytes; None: any size.

    Raises:
        UnreadableError: it is no regular file, or it is larger than the limit.
    """
    found = find(path)
    if found is None:
        missing = UnreadableError("does not exist")
        missing.missing = True
        raise missing
    if (kind := kind_of(found)) != "a file":
        raise UnreadableError(f"is {kind}, not a file")
    if limit is not None:
        require_size(found.st_size, limit)
    return found


def require_size(size: int, limit: int) -> None:
    """Raises UnreadableError if there are more bytes than the limit."""
    if size > limit:
        raise UnreadableError(f"has {size:,} bytes, at most {limit:,} are read")


def read_file(path: Path, limit: int) -> bytes:
    """Content of a regular file.

    Raises:
        UnreadableError: it is no regular file, cannot be read or has more bytes than the limit.
    """
    require_file(path, limit)
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise UnreadableError(cannot_be_read(error)) from None
    require_size(len(data), limit)  # some files report no size before they are read
    return data


@contextmanager
def unreadable_named(file: str | Path, advice: str) -> Iterator[None]:
    """Raises UserError `FILE REASON; ADVICE` if reading a file in the block fails."""
    try:
        yield
    except UnreadableError as error:
        raise UserError(f"{file} {error}; {advice}") from None
    except OSError as error:
        raise UserError(f"{file} {cannot_be_read(error)}; {advice}") from None


def bounded_lines(stream: TextIO, file: Path) -> Iterator[str]:
    """Lines of a text file.

    Raises:
        UserError: a line has more than `MAX_CAPTION` characters.
    """
    number = 0
    while line := stream.readline(MAX_CAPTION + 1):
        number += 1
        if len(line) > MAX_CAPTION:
            raise UserError(f"{file}:{number} has more than {MAX_CAPTION:,} characters; write one image per line")
        yield line


def cannot_be_read(error: OSError) -> str:
    """Words for an error of the operating system, after the name of a file."""
    return f"cannot be read ({error.strerror or error})"
