"""What tells a data set from another one, cheaply: settings, names, sizes and times, not the contents of files.

A run that goes on compares the fingerprint of its data with that of its beginning. A file that is written again counts
as another one, even with the same bytes; one that is copied with its time (`cp -p`, `rsync -a`) is the same.
"""

from __future__ import annotations

import json
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
        """Go on with values that JSON can hold."""
        self._digest.update(json.dumps(values, sort_keys=True).encode() + b"\n")

    def add_file(self, file: Path, *values: object) -> None:
        """Go on with values, and the size and time of a file, or that there is none."""
        try:
            found = find(file)
        except UnreadableError as error:
            self.add(*values, str(error))
        else:
            self.add(*values, None if found is None else [found.st_size, found.st_mtime_ns])

    def add_bytes(self, data: bytes) -> None:
        """Go on with bytes."""
        self.add(len(data))
        self._digest.update(data)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._digest.hexdigest()
