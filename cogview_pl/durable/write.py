"""Files that are whole or absent, whatever happens while they are written: a kill, a power cut, a full disk.

A file is written under another name beside its place, brought to the disk, and moved onto its place in one step. A
reader therefore finds the old content or the new one. What a kill leaves behind is a draft, which nothing reads.
Nothing is written through a symbolic link: a folder that somebody else has made could lead it anywhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogview_pl.errors import UserError

_DRAFT = ".cogview_pl-draft"  # a name that nobody else uses, since drafts are deleted
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
            draft.unlink(missing_ok=True)
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # never through a link
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
    with disk_full_named(file), open(file, "ab", opener=no_links) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def no_links(path: str, flags: int) -> int:
    """Opener for `open`: a symbolic link is an error (ELOOP) and not followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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


def clear_for_writing(folder: Path) -> None:
    """Make sure that writing below a folder stays there, and delete what killed runs left half-written.

    Raises:
        UserError: a symbolic link leads out of the folder, or something in it is no file (a named pipe would be waited
            for without end). Nothing has been deleted then.
    """
    home, left, drafts = folder.resolve(), [str(folder)], []
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    _require_inside(Path(entry.path), home)
                elif entry.is_dir():
                    left.append(entry.path)
                elif not entry.is_file():
                    raise UserError(f"{entry.path} is neither a file nor a folder, and no run has made it; delete it")
                elif is_draft(entry.name):
                    drafts.append(Path(entry.path))
    for draft in drafts:
        draft.unlink(missing_ok=True)


def _require_inside(link: Path, home: Path) -> None:
    if home not in link.resolve().parents:
        raise UserError(
            f"{link} is a link that leads out of the run folder, to {os.readlink(link)}; a run does not write through "
            "it: put the files themselves in its place, or delete it"
        )


def is_draft(name: str) -> bool:
    """Whether a file name is that of a draft."""
    return name.startswith(".") and name.endswith(_DRAFT)


def sync_folder(folder: Path) -> None:
    """Make a renamed file survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
