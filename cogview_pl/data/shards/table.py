"""The samples of one tar file in columns: what its headers say, whatever of it a data set uses."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogview_pl.data.left_out import LeftOut
from cogview_pl.data.packed import Texts, counts_of, packed
from cogview_pl.data.progress import Progress
from cogview_pl.data.samples import fractions_of
from cogview_pl.data.shards.keys import samples_of
from cogview_pl.data.shards.tar_headers import BLOCK, LINK, DamagedError, Member, Span, members
from cogview_pl.durable.read import UnreadableError, cannot_be_read
from cogview_pl.errors import UserError

MEBIBYTE = 2**20


@dataclass
class ShardTable:
    """Samples in the order of their first members, and members by sample.

    Args:
        keys: of the samples.
        fractions: float64, `fraction_of` each key, which decides on the split.
        member_ends: number of members of all samples up to each of them.
        kinds: number of the extension of each member.
        blocks: offset of each member in blocks; a negative number is the offset of a place without bytes, such as
            `SPARSE_MEMBER`.
        sizes: of the members in bytes.
        extensions: by number, the last part in lower case.
        left_out: members that belong to no sample.
        num_longer_keys: keys that go on after the first dot of their names.
        first_longer_key: the first of them.
    """

    keys: Texts
    fractions: np.ndarray
    member_ends: np.ndarray
    kinds: np.ndarray
    blocks: np.ndarray
    sizes: np.ndarray
    extensions: list[str]
    left_out: LeftOut
    num_longer_keys: int = 0
    first_longer_key: str = ""

    def members(self, index: int) -> dict[str, Span]:
        """The places of the members of a sample by extension, in the order of the file."""
        found = range(int(self.member_ends[index - 1]) if index else 0, int(self.member_ends[index]))
        return {self.extensions[self.kinds[one]]: span_of(self.blocks[one], self.sizes[one]) for one in found}


def span_of(block: int, size: int) -> Span:
    """The place of a member from its columns."""
    return Span(int(block) * BLOCK if block >= 0 else int(block), int(size))


def read_shard(path: Path, image_extensions: Collection[str], progress: Progress | None = None) -> ShardTable:
    """Read the headers of a tar file.

    Members whose names are equal up to the first dot of the base name are a sample, with the exceptions of
    `keys.py`. Of two members with the same name the later counts, as when a tar file is unpacked.

    Args:
        path: the tar file.
        image_extensions: extensions of images.
        progress: is told of each `MEBIBYTE` that has been passed.

    Raises:
        UserError: the file is no tar file, is compressed, ends early, has a member that is not within it, or goes on
            after the end of the tar file with other data.
    """
    found = _Members()
    passed = 0
    try:
        for some in members(path):
            found.add(some)
            if progress is not None and some[-1][1] // MEBIBYTE > passed:
                progress.update(some[-1][1] // MEBIBYTE - passed)
                passed = some[-1][1] // MEBIBYTE
    except UnreadableError as error:
        raise UserError(f"{path} {error}; give a tar file, or leave it out of data.urls") from None
    except OSError as error:
        raise UserError(f"{path} {cannot_be_read(error)}; see to it, or leave it out of data.urls") from None
    except DamagedError as error:
        if error.at == 0:
            raise UserError(
                f"{path} is not an uncompressed tar file or is cut off ({error}); "
                "unpack it if it is compressed, otherwise fetch it again or leave it out of data.urls"
            ) from None
        raise UserError(
            f"{path} is cut off or damaged at byte {error.at} ({len(set(found.stems)):,} samples before it): {error}; "
            "fetch or write it again, or leave it out of data.urls"
        ) from None
    return found.table(image_extensions)


class _Members:
    """Members as they come. Those of a stem (a name up to its first dot) are mostly neighbours: a run."""

    def __init__(self) -> None:
        self.stems: list[bytes] = []
        self.left_out = LeftOut()
        self._last: bytes | None = None
        self._run_starts = array("q")
        self._kinds = array("q")
        self._offsets = array("q")
        self._sizes = array("q")
        self._numbers: dict[bytes, int] = {}  # of what follows the first dot

    def add(self, some: Iterable[Member]) -> None:
        """Take further members."""
        last, numbers = self._last, self._numbers
        for name, offset, size in some:
            base = name.rfind(b"/") + 1
            dot = name.find(b".", base)
            if offset == LINK.offset or dot <= base:
                self._leave_out(name, offset, dot)
                continue
            stem, rest = name[:dot], name[dot + 1 :]
            if stem != last:
                last = stem
                self.stems.append(stem)
                self._run_starts.append(len(self._kinds))
            number = numbers.get(rest)
            if number is None:
                number = numbers[rest] = len(numbers)
            self._kinds.append(number)
            self._offsets.append(offset)
            self._sizes.append(size)
        self._last = last

    def _leave_out(self, name: bytes, offset: int, dot: int) -> None:
        hidden = "hidden files" if dot >= 0 else "without an extension"
        self.left_out.add("links" if offset == LINK.offset else hidden, _text(name))

    def table(self, image_extensions: Collection[str]) -> ShardTable:
        """The samples."""
        extensions: dict[str, int] = {}
        of_number = [extensions.setdefault(_lower_extension(_text(rest)), len(extensions)) for rest in self._numbers]
        kinds = np.array(of_number, dtype=np.int64)[_numbers(self._kinds)]
        keys = [_key(stem) for stem in self.stems]
        fractions = fractions_of(keys)
        ends = np.append(_numbers(self._run_starts)[1:], len(kinds))[: len(keys)]
        if self._usual(fractions, ends, kinds, extensions):
            offsets, sizes = _numbers(self._offsets), _numbers(self._sizes)
            return _table(keys, fractions, ends, kinds, offsets, sizes, list(extensions), self.left_out)
        return self._regrouped(image_extensions)

    def _usual(self, fractions: np.ndarray, ends: np.ndarray, kinds: np.ndarray, extensions: Collection[str]) -> bool:
        """Whether each run is a sample: no stem or name comes again, and none has further dots."""
        if any("." in extension for extension in extensions):
            return False
        runs = np.repeat(np.arange(len(ends)), counts_of(ends))
        return _differ(fractions) and _differ(runs * max(1, len(extensions)) + kinds)

    def _regrouped(self, image_extensions: Collection[str]) -> ShardTable:
        """The samples where members of one are not neighbours, names come again, or have dots of their own."""
        keys: list[bytes] = []
        ends, kinds, offsets, sizes = (array("q") for _ in range(4))
        numbers: dict[str, int] = {}
        longer, first_longer = 0, ""
        for stem, named in self._by_stem().items():
            for key, found in samples_of(stem, named, image_extensions):
                keys.append(key.encode("utf-8", "surrogatepass"))
                if key != stem:
                    longer, first_longer = longer + 1, first_longer or key
                for extension, (offset, size) in found.items():
                    kinds.append(numbers.setdefault(extension, len(numbers)))
                    offsets.append(offset)
                    sizes.append(size)
                ends.append(len(kinds))
        found_ends, found_kinds, found_offsets, found_sizes = map(_numbers, (ends, kinds, offsets, sizes))
        fractions = fractions_of(keys)
        table = _table(
            keys, fractions, found_ends, found_kinds, found_offsets, found_sizes, list(numbers), self.left_out
        )
        table.num_longer_keys, table.first_longer_key = longer, first_longer
        return table

    def _by_stem(self) -> dict[str, dict[str, Span]]:
        """Places by stem and extension, both in the order of the file."""
        found: dict[str, dict[str, Span]] = {}
        rests = [_text(rest) for rest in self._numbers]
        ends = [*self._run_starts[1:], len(self._kinds)][: len(self.stems)]
        for stem, start, end in zip(self.stems, self._run_starts, ends, strict=True):
            named = found.setdefault(_text(stem), {})
            for member in range(start, end):
                rest = rests[self._kinds[member]]
                extension = _lower_extension(rest)
                if extension in named:
                    self.left_out.add("earlier members of a name that appears twice", f"{_text(stem)}.{rest}")
                named[extension] = Span(self._offsets[member], self._sizes[member])
        return found


def _table(
    keys: list[bytes],
    fractions: np.ndarray,
    ends: np.ndarray,
    kinds: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    extensions: list[str],
    left_out: LeftOut,
) -> ShardTable:
    key_ends = np.cumsum(np.fromiter(map(len, keys), np.int64, len(keys)))
    texts = Texts(np.frombuffer(b"".join(keys), np.uint8), packed(key_ends))
    blocks = np.where(offsets < 0, offsets, offsets // BLOCK)
    return ShardTable(
        texts, fractions, packed(ends), packed(kinds), packed(blocks), packed(sizes), extensions, left_out
    )


def _differ(values: np.ndarray) -> bool:
    ordered = np.sort(values)
    return bool((ordered[1:] != ordered[:-1]).all())


def _numbers(column: array[int]) -> np.ndarray:
    return np.array(column, dtype=np.int64)


def _key(stem: bytes) -> bytes:
    """A key in the form of `Texts`, which has another form of bytes that are no UTF-8."""
    return stem if stem.isascii() else _text(stem).encode("utf-8", "surrogatepass")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _lower_extension(rest: str) -> str:
    """What follows the first dot of a name, with the part after the last dot in lower case."""
    middle, dot, extension = rest.rpartition(".")
    return middle + dot + extension.lower()
