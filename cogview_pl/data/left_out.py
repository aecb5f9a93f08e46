"""Files that a data set does not use: counted by kind, so that one line can say so."""

from __future__ import annotations

import re
from collections import Counter

_KINDS_NAMED = 6
_PLURAL = re.compile(r"^((?:\S+ )?(?:file|folder|link|image|member|pipe|socket|device))s\b")


class LeftOut:
    """Number of unused files by kind, and the first file of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, file: str, count: int = 1) -> None:
        """Count files.

        Args:
            kind: in words, in the plural, such as `.psd` or `links`.
            file: name of the first of them, for an example.
            count: number of files.
        """
        self._counts[kind] += count
        self._first.setdefault(kind, file)

    def kinds(self) -> list[tuple[str, str, int]]:
        """Kind, first file and number of each kind: the arguments of `add`."""
        return [(kind, self._first[kind], count) for kind, count in self._counts.items()]

    @property
    def total(self) -> int:
        """Number of files."""
        return self._counts.total()

    def line(self, unit: str = "file") -> str:
        """Such as `14 files are left out: 9 .txt (a.txt …), 3 .psd (b.psd …)`; empty where nothing is left out."""
        if not self._counts:
            return ""
        kinds = self._counts.most_common()
        named = [
            f"{count:,} {_of(kind, count)} ({self._first[kind]}{' …' * (count > 1)})"
            for kind, count in kinds[:_KINDS_NAMED]
        ]
        if rest := sum(count for _, count in kinds[_KINDS_NAMED:]):
            named.append(f"{rest:,} of other kinds")
        said = f"{unit} is" if self.total == 1 else f"{unit}s are"
        return f"{self.total:,} {said} left out: {', '.join(named)}"


def _of(kind: str, count: int) -> str:
    """A kind, in the singular where there is one: `hidden files`, `hidden file`."""
    return _PLURAL.sub(r"\1", kind) if count == 1 else kind
