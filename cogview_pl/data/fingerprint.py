"""Fingerprints of data sets: settings, names, sizes and times of files, not their contents.

A resumed run compares the fingerprint of its data with that of its beginning. A file that is written again has another
fingerprint, even with the same bytes; a copy that keeps the time (`cp -p`, `rsync -a`) has the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import xxhash

from cogview_pl.durable.read import UnreadableError, find


class Fingerprint:
    """A digest of values in their order.

    Args:
        kind: of data set.
    """

    def __init__(self, kind: str) -> None:
        self._digest = xxhash.xxh3_128()
        self.add(kind)

    def add(self, *values: object) -> None:
        """Add values that JSON can hold."""
        self._digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")

    def add_file(self, file: Path, *values: object) -> None:
        """Add values, and the size and time of a file, or that it is missing."""
        try:
            found = find(file)
        except UnreadableError as error:
            self.add(*values, str(error))
        else:
            self.add(*values, None if found is None else [found.st_size, found.st_mtime_ns])

    def add_bytes(self, data: bytes) -> None:
        """Add bytes."""
        self.add_parts(len(data), (data,))

    def add_parts(self, size: int, parts: Iterable[bytes]) -> None:
        """Add `size` bytes that come in parts, as `add_bytes` adds them at once."""
        self.add(size)
        for part in parts:
            self._digest.update(part)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._digest.hexdigest()
