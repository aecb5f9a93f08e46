"""Places of the members of all samples of WebDataset shards, in arrays: Python objects of millions take more memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from cogview_pl.data.left_out import LeftOut
from cogview_pl.data.packed import Texts, counts_of, packed
from cogview_pl.data.progress import NewProgress, Progress
from cogview_pl.data.shards.cache import keep_table, kept_table
from cogview_pl.data.shards.table import MEBIBYTE, ShardTable, read_shard, span_of
from cogview_pl.data.shards.tar_headers import NO_MEMBER, Span
from cogview_pl.errors.signals import SIGNALS

IMAGE = "/image"
"""Stands for the extension of the image among the members of a sample; no extension has a slash."""

_OPEN: WeakValueDictionary[tuple[object, ...], ShardIndex] = WeakValueDictionary()
"""Indices in use, by what they are made of: both splits of a data set have one."""


def shard_index(
    shards: Sequence[Path], image_extensions: Collection[str], text_extensions: Sequence[str], progress: NewProgress
) -> ShardIndex:
    """The index of shards: one that is in use, one made of kept indices, or a new one; see `ShardIndex`."""
    states = [_state(path) for path in shards]
    of = (tuple(image_extensions), tuple(text_extensions), *zip(shards, map(_size_and_time, states), strict=True))
    found = _OPEN.get(of)
    if found is None:
        found = _OPEN[of] = ShardIndex(shards, states, image_extensions, text_extensions, progress)
    return found


class ShardIndex:
    """Keys and places of the samples of tar files, in the order of the files.

    Args:
        shards: tar files.
        states: their status; None where it cannot be read.
        image_extensions: extensions of images; the image of a sample is its first member with one of them.
        text_extensions: extensions of the other members to keep.
        progress: shows how many shards have been read.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        states: Sequence[os.stat_result | None],
        image_extensions: Collection[str],
        text_extensions: Sequence[str],
        progress: NewProgress,
    ) -> None:
        self.shards = list(shards)
        self.extensions: set[str] = set()
        """Extensions of all members of samples."""
        self._kinds = [IMAGE, *text_extensions]
        self._image_extensions = image_extensions
        self._left_out = LeftOut()
        self._longer_keys, self._first_longer_key = 0, ""
        parts: list[_Part] = []
        sizes = [0 if state is None else state.st_size // MEBIBYTE for state in states]
        with progress("index shards", sum(sizes), "MiB") as done:
            for path, state, size in zip(self.shards, states, sizes, strict=True):
                SIGNALS.check()
                parts.append(self._take(_table_of(path, state, size, image_extensions, done)))
        self._ends = np.cumsum([len(part.keys) for part in parts])
        self._keys = Texts.joined([part.keys for part in parts])
        self.fractions = np.concatenate([part.fractions for part in parts])
        """float64, `fraction_of` the key of each sample, which decides on the split."""
        self._blocks, self._sizes = {}, {}
        for kind in self._kinds:
            self._blocks[kind] = packed(np.concatenate([part.blocks.pop(0) for part in parts]))
            self._sizes[kind] = packed(np.concatenate([part.sizes.pop(0) for part in parts]))
        self.notes = self._all_notes()
        """What a user should know of all samples and members: a line for each."""

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The key of a sample."""
        return self._keys[index]

    def place(self, index: int, kind: str) -> tuple[int, Span]:
        """Shard and place of a member.

        Args:
            index: of the sample.
            kind: `IMAGE` or an extension.
        """
        return self._shard(index), span_of(self._blocks[kind][index], self._sizes[kind][index])

    def having(self, kind: str, limit: int) -> list[int]:
        """Samples that have a member, at equal distances over all of them.

        Args:
            kind: `IMAGE` or an extension.
            limit: largest number of samples.
        """
        found = np.flatnonzero(self._blocks[kind] != NO_MEMBER.offset)
        return found[np.unique(np.linspace(0, len(found) - 1, min(limit, len(found)), dtype=np.int64))].tolist()

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _take(self, table: ShardTable) -> _Part:
        """The columns of a shard that are needed; counts the other members."""
        of_image = np.array([one in self._image_extensions for one in table.extensions], dtype=bool)
        samples = np.repeat(np.arange(len(table.keys)), counts_of(table.member_ends))
        left = np.ones(len(table.kinds), dtype=bool)
        part = _Part(table.keys, table.fractions)
        for kind in self._kinds:
            wanted = of_image if kind == IMAGE else np.array([one == kind for one in table.extensions], dtype=bool)
            members = np.flatnonzero(wanted[table.kinds])
            firsts = np.unique(samples[members], return_index=True)[1]
            members = members[firsts]
            left[members] = False
            part.add(samples[members], table.blocks[members], table.sizes[members])
        for kind, first, count in table.left_out.kinds():
            self._left_out.add(kind, first, count)
        self._count_left_out(table, samples, np.flatnonzero(left))
        self._longer_keys += table.num_longer_keys
        self._first_longer_key = self._first_longer_key or table.first_longer_key
        self.extensions.update(table.extensions)
        return part

    def _count_left_out(self, table: ShardTable, samples: np.ndarray, members: np.ndarray) -> None:
        """Count members that are no part of a sample, by their extensions."""
        kinds, firsts, counts = np.unique(table.kinds[members], return_index=True, return_counts=True)
        for one in np.argsort(firsts):
            rest = table.extensions[kinds[one]]
            extension = rest.rpartition(".")[2]
            kind = "further images of a sample" if extension in self._image_extensions else f".{extension}"
            self._left_out.add(kind, f"{table.keys[samples[members[firsts[one]]]]}.{rest}", int(counts[one]))

    def _all_notes(self) -> list[str]:
        notes = [self._left_out.line("member")]
        if self._longer_keys:
            names = "name has" if self._longer_keys == 1 else "names have"
            notes.append(
                f"{self._longer_keys:,} {names} dots, such as {self._first_longer_key}; each of them up to its last "
                "dot is a key"
            )
        notes.append(self._repeated())
        return [note for note in notes if note]

    def _repeated(self) -> str:
        """Such as `2 keys are in several places, such as a in 0.tar and 1.tar; …`; empty where all keys differ."""
        ordered = np.sort(self.fractions)
        if (ordered[1:] != ordered[:-1]).all():
            return ""
        order = np.argsort(self.fractions, kind="stable")
        pairs = np.flatnonzero(self.fractions[order][1:] == self.fractions[order][:-1])
        again = [one for one in pairs if self._keys.encoded(order[one]) == self._keys.encoded(order[one + 1])]
        if not again:
            return ""
        first, second = order[again[0]], order[again[0] + 1]
        shards = [self.shards[self._shard(one)] for one in (first, second)]
        have = "sample has" if len(again) == 1 else "samples have"
        return (
            f"{len(again):,} {have} the key of an earlier one, such as {self.key(first)} in {shards[0]} and "
            f"{shards[1]}; all of them are read"
        )


@dataclass
class _Part:
    """The columns of one shard: keys, fractions, and for each kind blocks and sizes by sample."""

    keys: Texts
    fractions: np.ndarray
    blocks: list[np.ndarray] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)

    def add(self, samples: np.ndarray, blocks: np.ndarray, sizes: np.ndarray) -> None:
        """Add a kind, of which these samples have a member."""
        of_all = np.full(len(self.keys), NO_MEMBER.offset, dtype=np.int64)
        of_all[samples] = blocks
        self.blocks.append(packed(of_all))
        of_all = np.zeros(len(self.keys), dtype=np.int64)
        of_all[samples] = sizes
        self.sizes.append(packed(of_all))


def _table_of(
    path: Path, state: os.stat_result | None, size: int, image_extensions: Collection[str], progress: Progress
) -> ShardTable:
    """The samples of a shard, from its kept index or its headers."""
    table = None if state is None else kept_table(path, state)
    if table is not None:
        progress.update(size)
        return table
    table = read_shard(path, image_extensions, progress)
    if state is not None:
        keep_table(path, state, table)
    return table


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # reading it says why
        return None


def _size_and_time(state: os.stat_result | None) -> tuple[int, int] | None:
    return None if state is None else (state.st_size, state.st_mtime_ns)
