"""Atomic writes: a kill, a power cut or a full disk leaves the old content of a file or the new content.

A file is written as a draft in the same folder, synced to the disk, and renamed to its final name in one step. A kill
leaves at most a draft, and no code reads drafts. Symbolic links are not followed, because a link in a downloaded folder
could lead anywhere.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogview_pl.errors import UserError

_DRAFT = ".cogview_pl-draft"  # a suffix that no other program uses, because drafts are deleted
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # limit of the disk, of the user's quota, of the file size
_FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")  # errors of native libraries


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Path of a draft; it replaces `file` when the block ends, and is deleted when the block fails.

    Raises:
        UserError: the disk is full; `file` is unchanged.
    """
    draft = file.with_name(f".{file.name}{_DRAFT}")
    try:
        with disk_full_named(file):
            draft.unlink(missing_ok=True)
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # never through a link
            yield draft
            with draft.open("r+b") as stream:  # Windows syncs only a file that is open for writing
                os.fsync(stream.fileno())
            os.replace(draft, file)
            sync_folder(file.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def link(source: Path, file: Path) -> None:
    """Let `file` name the content of `source` too, in one step; a copy where the file system has no hard links.

    Neither file may be changed in place afterwards. Raises UserError as `replacing` does.
    """
    if file.exists() and file.samefile(source):
        return
    with replacing(file) as draft:
        draft.unlink()
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)


def write_text(file: Path, text: str) -> None:
    """Replace a UTF-8 text file; see `replacing`."""
    with replacing(file) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(file: Path, data: bytes) -> None:
    """Replace a file; see `replacing`."""
    with replacing(file) as draft:
        draft.write_bytes(data)


def append(file: Path, data: bytes) -> None:
    """Add bytes to the end of a file and sync it; if this fails, some of the bytes may be in the file.

    Raises:
        UserError: the disk is full.
    """
    with disk_full_named(file), open(file, "ab", opener=no_links) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def no_links(path: str, flags: int) -> int:
    """Opener for `open` that refuses symbolic links (error ELOOP)."""
    if not _NOFOLLOW and os.path.islink(path):  # Windows
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    return os.open(path, flags | _NOFOLLOW, 0o666)


@contextmanager
def disk_full_named(file: Path) -> Iterator[None]:
    """Raises UserError that names the file if a write in the block finds no space on the disk."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and is_disk_full(error):
            raise UserError(disk_full(file)) from error
        raise


def disk_full(file: Path) -> str:
    """Message for a write that found no space on the disk."""
    return (
        f"{file}: no space left on the disk (or the quota, or the size that a file may have); what was written before "
        "is intact; free some, then go on"
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, means that no space is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_IN_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def clear_for_writing(folder: Path) -> None:
    """Delete drafts below a folder, after a check that no link leads out of it.

    Raises:
        UserError: a symbolic link leads out of the folder, or an entry is no file and no folder (opening a named pipe
            could wait forever). Then no draft is deleted.
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
    """Whether a file name is the name of a draft."""
    return name.startswith(".") and name.endswith(_DRAFT)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that a renamed file survives a power cut; has no effect where folders cannot be opened."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
