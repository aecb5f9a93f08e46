"""Images that were decoded though something in their files is broken: they are listed and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cogview_pl.data.bad_samples import BadSampleLog
from cogview_pl.data.records import read_record
from cogview_pl.data.samples import Skipped


class MendedLog:
    """Lists mended images in a file, each key once; an existing file is extended.

    Args:
        path: the file, `mended.jsonl` in the run's folder.

    Raises:
        UserError: the existing file cannot be read, or is no such list.
    """

    def __init__(self, path: Path) -> None:
        self._log = BadSampleLog(path, max_share=1.0)

    @property
    def count(self) -> int:
        """Number of different images in the file."""
        return self._log.count

    def add(self, remarks: Mapping[str, str]) -> None:
        """Record remarks by the key of the image."""
        self._log.note(Skipped(key, remark) for key, remark in remarks.items())

    def summary(self) -> str:
        """The remarks with their numbers in one line; empty if there are none."""
        if not self.count:
            return ""
        lines = self._log.path.read_bytes().splitlines()
        found = Counter(str(read_record(line)["reason"]) for line in lines)
        kinds = ", ".join(f"{number} × {remark}" for remark, number in found.most_common())
        return f"images that were decoded with a remark: {kinds}; see {self._log.path}"
