"""Files that are whole or absent, whatever happens while they are written: a kill, a power cut, a full disk.

A file is written under another name beside its place, brought to the disk, and moved onto its place in one step. A
reader therefore finds the old content or the new one. What a kill leaves behind is a draft, which nothing reads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogview_pl.errors import UserError

_DRAFT = ".draft"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the largest file that is allowed
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")  # from libraries not in Python


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The path of a draft; when the block ends it takes the place of `file`, when it fails it is removed.

    Raises:
        UserError: the disk is full; `file` is as it was.
    """
    draft = file.with_name(f".{file.name}{_DRAFT}")
    try:
        with disk_full_named(file):
            yield draft
            with draft.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(draft, file)
            sync_folder(file.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Replace a UTF-8 text file; see `replacing`."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8")


def write_bytes(file: Path, data: bytes) -> None:
    """Replace a file; see `replacing`."""
    with replacing(file) as draft:
        draft.write_bytes(data)


def append(file: Path, data: bytes) -> None:
    """Add to the end of a file; when this returns the bytes are on disk, when it fails some of them may be.

    Raises:
        UserError: the disk is full.
    """
    with disk_full_named(file), file.open("ab") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def disk_full_named(file: Path) -> Iterator[None]:
    """Turns the failure of a write for want of space into a UserError that names the file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and is_disk_full(error):
            raise UserError(disk_full(file)) from error
        raise


def disk_full(file: Path) -> str:
    """The line for a write that found no space."""
    return (
        f"{file}: no space left on the disk (or the quota, or the size that a file may have); what was written before "
        "is intact. Free some, then go on with resume=RUN_FOLDER"
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that there is no space left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_IN_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove_drafts(folder: Path) -> None:
    """Delete what killed runs left half-written below a folder."""
    for draft in folder.rglob(f".*{_DRAFT}"):
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a renamed file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
