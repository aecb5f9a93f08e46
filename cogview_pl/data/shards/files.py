"""The shards that patterns name, and a cache of open files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import BinaryIO

from braceexpand import braceexpand

from cogview_pl.durable.read import find, kind_of, require_file, unreadable_named
from cogview_pl.errors import UserError

MAX_OPEN = 64
"""Largest number of shards that one process keeps open."""
MAX_SHARDS = 1_000_000
"""Largest number of shards that a pattern may name: braceexpand makes the complete list."""


def expand_urls(urls: str | Sequence[str], name: str, extension: str = "tar") -> list[Path]:
    """The local files that patterns with braces and `*` name, each once: in the order of the patterns, then sorted.

    Args:
        urls: one pattern or several.
        name: the configuration key, for messages.
        extension: of the files, for messages.

    Raises:
        UserError: a pattern matches no file, or something that is neither file nor folder; it is remote, or has
            unbalanced braces or too long a range; or there are no patterns.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    files = [file for pattern in patterns for file in _expand(pattern, name, extension)]
    if not files:
        raise UserError(f"{name} is empty; give at least one .{extension} file")
    return list(dict.fromkeys(files))


def _expand(pattern: str, name: str, extension: str) -> Iterator[Path]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|pipe:", pattern):
        raise UserError(f"{name}={pattern} is remote; download the shards first and give their local path")
    counts = [_count(first, last) for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)]
    if math.prod(counts) > MAX_SHARDS:
        raise UserError(f"{name}={pattern} stands for more than {MAX_SHARDS:,} shards; check its ranges")
    try:
        texts = braceexpand(pattern)
    except ValueError:
        raise UserError(f"{name}={pattern} has unbalanced braces; write a range as {{000..003}}") from None
    for text in texts:
        path = Path(os.path.expanduser(text))
        seen = _seen(path, name)
        files = [path] if seen is not None else map(Path, sorted(glob(str(path), recursive=True)))
        found = [file for file in files if _is_file(file, name, extension)]
        if not found:
            is_folder = seen is not None and kind_of(seen) == "a folder"
            advice = f"it is a folder, write {path}/*.{extension}" if is_folder else "check path and range"
            raise UserError(f"{name}={pattern}: no file matches {path}; {advice}")
        yield from found


def files_of_split(train: list[Path], val: list[Path], split: str) -> tuple[list[Path], str]:
    """The files of a split, and their configuration key; raises UserError if a file is in both splits."""
    known = {path.resolve() for path in train}
    both = next((path for path in val if path.resolve() in known), None)
    if both is not None:
        raise UserError(f"data.val_urls: {both} is in data.urls too; take it out of one of them")
    return (train, "data.urls") if split == "train" else (val, "data.val_urls")


def _count(first: str, last: str) -> int:
    """Upper limit of the length of a range; Python refuses numbers of thousands of digits."""
    return abs(int(last) - int(first)) + 1 if len(first + last) < 100 else MAX_SHARDS + 1


def _is_file(file: Path, name: str, extension: str) -> bool:
    """Whether a path is a file; False for a folder, which `*` may match; raises UserError for anything else."""
    seen = _seen(file, name)
    if seen is None:
        raise UserError(f"{name}: {file} is a link to what does not exist; mend or remove it")
    kind = kind_of(seen)
    if kind not in ("a file", "a folder"):
        raise UserError(f"{name}: {file} is {kind}, not a file; give .{extension} files")
    return kind == "a file"


def _seen(file: Path, name: str) -> os.stat_result | None:
    with unreadable_named(f"{name}: {file}", "see to it, or leave it out"):
        return find(file)


class OpenFiles:
    """A cache of open files; the oldest is closed when there are too many.

    A forked or pickled copy in another process starts empty, because a shared file would share its position.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._files: dict[Path, BinaryIO] = {}

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Bytes of a file; fewer where the file ends. Raises UnreadableError or OSError."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._files = {}
        if path not in self._files:
            if len(self._files) >= MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            require_file(path)
            self._files[path] = path.open("rb")
        self._files[path].seek(offset)
        return self._files[path].read(size)
