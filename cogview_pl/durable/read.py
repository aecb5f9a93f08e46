"""Files that a user names: what they are is known before they are opened, and no more of them is read than makes sense.

A named pipe would be waited for without end, a device can have any size, and what may not be read is not missing.
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
"""Largest caption with all that is around it, in bytes: a `.txt`, a `.json`, a line of a list (in characters)."""
MAX_IMAGE = 2**28
"""Largest image file in bytes; Pillow refuses more pixels than fit into it by far."""

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
    """A file cannot be used; the text says why, in words that go behind its name."""

    missing = False
    """Whether nothing is there."""


def find(path: str | Path) -> os.stat_result | None:
    """What is at a path, behind links; None where nothing is.

    Raises:
        UnreadableError: that cannot be known.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in _MISSING:
            return None
        raise UnreadableError(cannot_be_read(error)) from None
    except ValueError:  # a zero byte or half a character
        raise UnreadableError("has no name that a file can have") from None


def why_unusable(path: str | Path) -> str:
    """Words, to go behind the name of a path that was not what is needed: `does not exist`, or why that is not so."""
    try:
        found = find(path)
    except UnreadableError as error:
        return str(error)
    return "does not exist" if found is None else f"is {kind_of(found)}"


def kind_of(found: os.stat_result) -> str:
    """`a file`, `a folder`, `a named pipe`, …"""
    return next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")


def require_file(path: str | Path, limit: int | None = None) -> os.stat_result:
    """Check that a path leads to a regular file, without opening it.

    Args:
        path: the file.
        limit: its largest size in bytes.

    Raises:
        UnreadableError: it does not, or the file is larger.
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
    """Raises UnreadableError where there are more bytes than the limit."""
    if size > limit:
        raise UnreadableError(f"has {size:,} bytes, at most {limit:,} are read")


def read_file(path: Path, limit: int) -> bytes:
    """All of a regular file.

    Raises:
        UnreadableError: it is no regular file, cannot be read or has more bytes than the limit.
    """
    require_file(path, limit)
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise UnreadableError(cannot_be_read(error)) from None
    require_size(len(data), limit)  # some files have no size beforehand
    return data


@contextmanager
def unreadable_named(file: str | Path, advice: str) -> Iterator[None]:
    """While a file is read: raises UserError `FILE REASON; ADVICE` if that fails."""
    try:
        yield
    except UnreadableError as error:
        raise UserError(f"{file} {error}; {advice}") from None
    except OSError as error:
        raise UserError(f"{file} {cannot_be_read(error)}; {advice}") from None


def bounded_lines(stream: TextIO, file: Path) -> Iterator[str]:
    """The lines of a text.

    Raises:
        UserError: one of them has more than `MAX_CAPTION` characters.
    """
    number = 0
    while line := stream.readline(MAX_CAPTION + 1):
        number += 1
        if len(line) > MAX_CAPTION:
            raise UserError(f"{file}:{number} has more than {MAX_CAPTION:,} characters; write one image per line")
        yield line


def cannot_be_read(error: OSError) -> str:
    """The words for an error of the system, to go behind the name of a file."""
    return f"cannot be read ({error.strerror or error})"
