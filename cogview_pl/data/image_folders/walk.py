"""Files below a folder: the images in a fixed order, and what else lies there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cogview_pl.data.decoding.formats import IMAGE_EXTENSIONS
from cogview_pl.data.left_out import LeftOut
from cogview_pl.data.progress import NewProgress, Silent
from cogview_pl.durable.read import cannot_be_read, kind_of
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS

_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)

_OF_THE_SYSTEM = frozenset(("lost+found", "@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"))
"""Folders that systems make for themselves; those of a NAS hold small copies of the images."""


@dataclass
class FolderFiles:
    """Files below a folder, relative to it, in a fixed order: those of a folder by name, then its folders by name."""

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Regular files that are no images by their names."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Hidden files, folders that are not entered, and what is no file."""


def find_images(root: Path) -> Iterator[Path]:
    """All image files below a folder, except hidden files, in a fixed order.

    Links to folders are followed, except a link to a folder that contains the link.

    Raises:
        UserError: a folder cannot be read.
    """
    for file in walk(root).images:
        yield root / file


def walk(root: Path, progress: NewProgress = Silent, *, all_readable: bool = True) -> FolderFiles:
    """The files below a folder. Links to folders are followed, except a link to a folder that contains the link.

    An image is told by its extension. A link that leads nowhere counts as an image too, so that a missing image is
    said with its name.

    Args:
        root: the folder.
        progress: shows how many files were found.
        all_readable: False leaves out folders that cannot be read.

    Raises:
        UserError: a folder cannot be read.
    """
    found = FolderFiles()
    waiting = [("", frozenset((_identity(root),)))]  # a folder, and identities of itself and of those above it
    with progress(f"find files in {root}", None, "files") as bar:
        while waiting:
            folder, above = waiting.pop()
            SIGNALS.check()
            try:
                with os.scandir(root / folder) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                if all_readable:
                    raise UserError(
                        f"{root / folder} {cannot_be_read(error)}; make it readable, or move it away"
                    ) from None
                found.left_out.add("folders that cannot be read", folder)
                continue
            below = []
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    place = _identity(Path(entry.path))
                    if (why := _not_entered(entry.name)) or place in above:
                        found.left_out.add(why or "links to a folder above", path)
                    else:
                        below.append((path, above | {place}))
                else:
                    _add_file(found, entry, path)
            waiting += reversed(below)
            bar.update(len(entries))
    return found


def _add_file(found: FolderFiles, entry: os.DirEntry[str], path: str) -> None:
    if entry.name.startswith("."):
        found.left_out.add("hidden files", path)
    elif (kind := _no_file(entry)) is not None:
        found.left_out.add(f"{kind.removeprefix('a ')}s", path)
    elif is_image_name(entry.name):
        found.images.append(path)
    else:
        found.others.append(path)


def is_image_name(name: str) -> bool:
    """Whether the extension is that of an image."""
    return name.lower().endswith(_ENDINGS)


def _not_entered(name: str) -> str:
    if name in _OF_THE_SYSTEM:
        return f"{name} folders"
    return "hidden folders" if name.startswith(".") else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _no_file(entry: os.DirEntry[str]) -> str | None:
    """Kind of what is there and is no regular file, such as `a named pipe`."""
    try:
        if entry.is_file():
            return None
        found = entry.stat()
    except OSError:  # a link that leads nowhere
        return None
    return None if stat.S_ISREG(found.st_mode) else kind_of(found)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder, the same through every link; None where it cannot be read."""
    try:
        found = os.stat(folder)
    except OSError:  # reading its entries reports it
        return None
    return found.st_dev, found.st_ino
