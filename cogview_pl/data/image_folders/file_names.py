"""Names of images in listings, and the files that they mean."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import unquote

_FILE_URL = "file://"
_SEVERAL = ""  # stands for several files of one spelling


def normalised(name: str) -> str:
    """A name of a file without `.`, `..` and doubled slashes, so that `a.jpg` and `./a.jpg` are one key."""
    if name.startswith(_FILE_URL):
        name = unquote(name.removeprefix(_FILE_URL))
    return posixpath.normpath(name) if name else name


class FileNames:
    """Finds the files that a listing names, and counts those that are spelled otherwise on the disk.

    A name counts as it is if there is such a file. Else other spellings are tried: `/` for a backslash, the composed or
    decomposed form of Unicode (macOS writes é as two characters), other letter case, and the name without its
    extension; for a name without folders also the same name in any folder. A spelling of several files fits none.

    Args:
        root: folder that names start from.
        files: the files below it, relative to it.
        prefix: folder of the listing, relative to `root`; names may start from it too.
    """

    def __init__(self, root: Path, files: Iterable[str], prefix: str = "") -> None:
        self._root = root
        self._files = frozenset(files)
        self._prefix = prefix
        self._tables: dict[str, dict[str, str]] = {}
        self._said: Counter[str] = Counter()

    def find(self, given: str) -> str:
        """The file relative to the root; the normalised name where there is none."""
        name = normalised(given)
        names = [posixpath.join(self._prefix, name), name] if self._prefix else [name]
        for path in (*names, given):
            if path in self._files or os.path.lexists(self._root / path):
                return path
        if "\\" in given:
            names = [normalised(path.replace("\\", "/")) for path in names]
            if found := next((path for path in names if path in self._files), None):
                self._said["with / for \\"] += 1
                return found
        for how, of_file, of_name in _SPELLINGS:
            table = self._table(how, of_file)
            if found := next((table[key] for key in map(of_name, names) if table.get(key)), None):
                self._said[how] += 1
                return found
        return names[0]

    def knows(self, given: str) -> bool:
        """Whether there is such a file below the root."""
        return self.find(given) in self._files

    def notes(self) -> list[str]:
        """How the names of the listing differ from those of the files, with numbers."""
        return [f"{count:,} of the listed files were found {how}" for how, count in self._said.most_common()]

    def _table(self, how: str, of_file: Callable[[str], str]) -> dict[str, str]:
        """File by its spelling; `_SEVERAL` where several files have it."""
        if how not in self._tables:
            table: dict[str, str] = {}
            for file in self._files:
                key = of_file(file)
                table[key] = _SEVERAL if key in table else file
            self._tables[how] = table
        return self._tables[how]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


def _folded_stem(name: str) -> str:
    return _folded(posixpath.splitext(name)[0])


def _folded_base(name: str) -> str:
    return _folded(posixpath.basename(name))


def _without_folders(name: str) -> str:
    """The name, where it names no folder: else a file of another folder would take the place of a missing one."""
    return _folded(name) if "/" not in name else _SEVERAL


_SPELLINGS: tuple[tuple[str, Callable[[str], str], Callable[[str], str]], ...] = (
    ("in another form of Unicode", _composed, _composed),
    ("in other letter case", _folded, _folded),
    ("with an extension that their names lack", _folded_stem, _folded),
    ("in another folder, by their base names", _folded_base, _without_folders),
)
"""How a file is found, its spelling, and that of the name in a listing; the surest first."""
