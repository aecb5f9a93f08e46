"""Samples that cannot be read: they are set aside, listed and counted, and too many of them end the run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from cogview_pl.data.records import read_record, record_line
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.durable.read import UnreadableError, require_file, unreadable_named
from cogview_pl.durable.write import disk_full_named, no_links
from cogview_pl.errors import UserError
from cogview_pl.vocab.roles import CAPTION

_ENOUGH = 100
_PROBE = 100  # random samples that are read before a data set is read in order
_DEVIATIONS = 5  # standard deviations by which their share may be too large: a chance of one in a million


class BadSampleLog:
    """Lists skipped samples in a file, and raises when their share is too large.

    Each key is written once, as a line `{"key": …, "reason": …, "crc32": …}`. An existing file is read and extended.
    A data set that is read once, in order, is judged by `require_few`: its bad samples may all come first. Training
    draws samples at random, so `add` judges by those that it has seen.

    Args:
        path: the file, `skipped.jsonl` in the run's folder.
        max_share: largest share of skipped samples that is allowed, 0 … 1.
        minimum: number of samples to see before `add` compares the share (`enough_to_judge`).

    Raises:
        UserError: the existing file cannot be read, or is not such a list.
    """

    def __init__(self, path: Path, max_share: float, minimum: int = _ENOUGH) -> None:
        self.path = Path(path)
        self.max_share = max_share
        self.minimum = minimum
        self._seen = 0
        self._skipped = 0
        self._keys: set[str] = set()
        self._first: Skipped | None = None
        try:
            require_file(self.path)
        except UnreadableError as error:
            if not error.missing:
                raise UserError(f"{self.path} {error}; delete it") from None
        else:
            self._read()

    @property
    def count(self) -> int:
        """Number of different samples in the file."""
        return len(self._keys)

    def note(self, skipped: Iterable[Skipped]) -> None:
        """List the skipped samples that are not in the file."""
        new = {sample.key: sample for sample in skipped if sample.key not in self._keys}
        if new:
            with disk_full_named(self.path), open(self.path, "ab", opener=no_links) as stream:
                for sample in new.values():
                    stream.write(record_line(sample._asdict()))
                    self._remember(sample)

    def require_few(self, total: int) -> None:
        """Raises UserError if more than `max_share` of a data set of `total` samples are in the file."""
        if self._first and self.count > self.max_share * total:
            raise self._too_many(self.count, f"the {total:,} samples")

    def add(self, skipped: Iterable[Skipped], seen: int) -> None:
        """List the skipped samples among the `seen` samples that were read since the last call.

        Raises:
            UserError: more than `max_share` of all seen samples were skipped, and at least `minimum` were seen.
        """
        met = list(skipped)
        self._seen += seen
        self._skipped += len(met)  # repeated samples count in `seen` too, so the share stays right
        self.note(met)
        if self._first and self._seen >= self.minimum and self._skipped > self.max_share * self._seen:
            raise self._too_many(self._skipped, f"{self._seen:,} samples")

    def require_few_in_probe(self, images: CaptionedImages, look: Callable[[], None]) -> None:
        """Read random samples of a data set, so that a hopeless run ends at once.

        The same ones are read each time. The share in a probe differs from that of the set, so only a share that is
        larger by several standard deviations ends the run.

        Args:
            images: a data set.
            look: is called before each sample; it raises when the run was told to stop.

        Raises:
            UserError: the share of skipped samples is too large, almost surely.
        """
        size = min(_PROBE, len(images))
        bad = []
        for index in random.Random(0).sample(range(len(images)), size):
            look()
            sample = images[index]
            if isinstance(sample, Skipped):
                bad.append(sample)
        self.note(bad)
        deviation = math.sqrt(size * self.max_share * (1 - self.max_share))
        if len(bad) > size * self.max_share + _DEVIATIONS * deviation:
            raise self._too_many(len(bad), f"{size:,} samples, chosen at random,")

    def _too_many(self, count: int, of: str) -> UserError:
        assert self._first is not None
        return UserError(
            f"{count:,} of {of} cannot be used (first: {self._first.key}: {self._first.reason}); see {self.path}; "
            "raise data.max_skipped_share to go on"
        )

    def _read(self) -> None:
        *lines, rest = self.path.read_bytes().split(b"\n")
        if _is_record(rest[:-1]):  # its last byte was the line feed, and was damaged
            lines.append(rest)
        elif rest:  # a kill has cut the line off; the sample will be met again
            with self.path.open("r+b") as stream:
                stream.truncate(stream.seek(0, 2) - len(rest))
        for sample in _listed(self.path, lines):
            self._remember(sample)

    def _remember(self, sample: Skipped) -> None:
        self._first = self._first or sample
        self._keys.add(sample.key)


def listed(path: Path) -> Iterator[Skipped]:
    """The samples in the list of a finished run, in order; none if there is no list.

    Raises:
        UserError: the file cannot be read, or is no such list.
    """
    if path.exists():
        with unreadable_named(path, "copy the run again"):
            require_file(path)
            lines = path.read_bytes().splitlines()
        yield from _listed(path, lines)


def _listed(path: Path, lines: Iterable[bytes]) -> Iterator[Skipped]:
    for number, line in enumerate(lines, 1):
        try:
            yield Skipped(**read_record(line))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path}:{number} is damaged or no skipped sample; delete the file") from None


def _is_record(line: bytes) -> bool:
    try:
        return bool(read_record(line))
    except (ValueError, RecursionError):
        return False


def enough_to_judge(dataset_size: int) -> int:
    """Number of samples to see before the share of skipped ones is compared with its limit."""
    return min(_ENOUGH, dataset_size)


class ImageBatch(NamedTuple):
    """The B readable samples of a batch, and the skipped ones."""

    images: torch.Tensor
    """uint8 `(B, 3, Y, X)`; `(0, 3, 0, 0)` when no sample was readable."""
    texts: list[str]
    """Captions."""
    keys: list[str]
    skipped: list[Skipped]
    fields: Mapping[str, list[str]] = {}
    """B texts of each other text field of the samples (`ImageSample.fields`)."""
    remarks: Mapping[str, str] = {}
    """What was mended in images when they were decoded, by key."""
    others: Mapping[str, torch.Tensor] = {}
    """Further images, uint8 `(B, 3, Y, X)`, by name (`ImageSample.images`)."""

    @property
    def seen(self) -> int:
        """Number of samples that were read."""
        return len(self.keys) + len(self.skipped)

    def texts_of(self, field: str) -> list[str]:
        """The B texts of a field; `text` is the caption. Raises UserError where the samples lack the field."""
        if field == CAPTION or not self.keys:
            return self.texts
        if field not in self.fields:
            raise UserError(f"data: samples such as {self.keys[0]} have no text {field}, a slot of template.layout")
        return self.fields[field]

    def images_of(self, field: str) -> torch.Tensor:
        """The further images of a name; raises UserError where the samples lack them."""
        if not self.keys:
            return self.images
        if field not in self.others:
            raise UserError(f"data: samples such as {self.keys[0]} have no image {field}, a slot of template.layout")
        return self.others[field]


def collate_images(samples: list[ImageSample | Skipped]) -> ImageBatch:
    """Stack the images of a batch and set the skipped samples aside."""
    good = [sample for sample in samples if isinstance(sample, ImageSample)]
    none = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return ImageBatch(
        images=torch.stack([sample.image for sample in good]) if good else none,
        texts=[sample.text for sample in good],
        keys=[sample.key for sample in good],
        skipped=[sample for sample in samples if isinstance(sample, Skipped)],
        fields={name: [sample.text_of(name) for sample in good] for name in (good[0].fields if good else ())},
        remarks={sample.key: sample.remark for sample in good if sample.remark},
        others={name: torch.stack([s.image_of(name) for s in good]) for name in (good[0].images if good else ())},
    )


def require_readable(dataset: CaptionedImages, limit: int = 64) -> ImageSample:
    """A readable sample among the first one and random others, `limit` at most, for checks before a run starts.

    Raises:
        UserError: none can, or there are no samples.
    """
    size = len(dataset)
    if size == 0:
        raise UserError("data: the data set has no samples; check data.root, data.urls and data.val_fraction")
    others = random.Random(0).sample(range(1, size), min(limit, size) - 1)  # bad samples may all come first
    first: Skipped | None = None
    for index in (0, *others):
        sample = dataset[index]
        if isinstance(sample, ImageSample):
            return sample
        first = first or sample
    assert first is not None
    raise UserError(
        f"data: none of {len(others) + 1} samples of {size:,} can be used (first: {first.key}: {first.reason}); "
        "check data.root, data.urls and data.caption_field"
    )
