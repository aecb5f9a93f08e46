"""Lists that grow while a run works through its images: `samples.jsonl`, and `skipped.jsonl` of unreadable images.

The lines of a batch are added when it is done. A resumed run keeps the lines of whole batches, because the images of a
batch are computed together, and goes on with the next batch.
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from cogview_pl.data.input_images import InputImages
from cogview_pl.data.records import read_record, record_line
from cogview_pl.durable.write import append, write_bytes
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.run_folder import SAMPLES, SKIPPED, RunFolder

_log = logging.getLogger(__name__)

FILE_CRC32 = "file_crc32"
"""Field with the checksum of a file that the run has written, `file` of the same record."""


class _Line(NamedTuple):
    line: bytes
    skipped: bool


class ResultList:
    """The lists of a run, in the order of its images.

    If several processes share the images, only the first one writes.

    Args:
        folder: folder of the run.
        images: the images that the run works through.
        source: field of a record in `samples.jsonl` that names its image.
        settings: values that results depend on; a resumed run must have the same.
        inputs: hashes of the models; a resumed run must have the same.
        verify: whether the inputs are compared.

    Raises:
        UserError: a resumed run was begun with other models, images or settings.
    """

    def __init__(
        self,
        folder: RunFolder,
        images: InputImages,
        *,
        source: str = "file",
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        verify: bool,
    ) -> None:
        self._run, self._images, self._source = folder, images, source
        self._samples, self._skipped = folder / SAMPLES, folder / SKIPPED
        self.count = 0
        """Number of records in `samples.jsonl`."""
        self.num_skipped = 0
        """Number of records in `skipped.jsonl`."""
        if folder.writes:
            name = images.source.partition("=")[0]
            folder.require_same(settings, {**inputs, name: images.fingerprint()}, verify)

    def begin(self, *, resume: bool, batch_size: int) -> int:
        """Begin empty lists, or keep those of whole batches; returns the number of images that are done."""
        done = self._done(batch_size) if resume else []
        kept = {flag: [line for line, skipped in done if skipped == flag] for flag in (False, True)}
        self.count, self.num_skipped = len(kept[False]), len(kept[True])
        self._run.begin()
        if self._run.writes:
            write_bytes(self._samples, b"".join(kept[False]))
            if kept[True]:
                write_bytes(self._skipped, b"".join(kept[True]))
            else:
                self._skipped.unlink(missing_ok=True)
        return len(done)

    def add(self, samples: Sequence[Mapping[str, object]], skipped: Sequence[Mapping[str, object]]) -> None:
        """Add the records of a batch."""
        self.count += len(samples)
        self.num_skipped += len(skipped)
        for file, records in ((self._samples, samples), (self._skipped, skipped)):
            if self._run.writes and records:
                append(file, b"".join(map(record_line, records)))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of `samples.jsonl`, read one by one."""
        return (record for _, record in _lines(self._samples))

    def sort(self, key: Callable[[dict[str, Any]], Any]) -> None:
        """Put the records of `samples.jsonl` into order."""
        if self._run.writes:
            lines = sorted(((key(record), line) for line, record in _lines(self._samples)), key=itemgetter(0))
            write_bytes(self._samples, b"".join(line for _, line in lines))

    def first(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The first records of `samples.jsonl`, each with the number of its image."""
        numbers = iter(range(len(self._images)))
        for record, _ in zip(self.records(), range(count), strict=False):
            name = _name(record, self._source)
            yield next(number for number in numbers if self._name_of(number) == name), record

    def say_skipped(self) -> None:
        """Log how many images could not be read."""
        if self.num_skipped:
            _log.warning("left out: %d images that cannot be read, listed in %s", self.num_skipped, self._skipped)

    def _done(self, batch_size: int) -> list[_Line]:
        """Lines of the images that are done, in the order of the images, which a sorted list need not have."""
        found: dict[tuple[str, str], deque[_Line]] = defaultdict(deque)
        for file, source, skipped in ((self._samples, self._source, False), (self._skipped, "file", True)):
            for line, record in _lines(file):
                if self._intact(record):
                    found[_name(record, source)].append(_Line(line, skipped))
        done: list[_Line] = []
        for number in range(len(self._images)):
            SIGNALS.check()
            lines = found.get(self._name_of(number))
            if not lines:
                return done[: len(done) // batch_size * batch_size]
            done.append(lines.popleft())
        return done

    def _intact(self, record: Mapping[str, Any]) -> bool:
        """Whether the file that a record names is what the run wrote, if it wrote one."""
        if FILE_CRC32 not in record:
            return True
        file = self._run / str(record["file"])
        return file.is_file() and zlib.crc32(file.read_bytes()) == record[FILE_CRC32]

    def _name_of(self, number: int) -> tuple[str, str]:
        return _name(self._images.record(number), "file")


def _name(record: Mapping[str, Any], source: str) -> tuple[str, str]:
    return str(record.get(source)), str(record.get("prompt", ""))


def _lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of a list with their records, up to one that a kill has cut off."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        for line in stream:
            SIGNALS.check()
            try:
                record = read_record(line, ours=True)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield line, record
