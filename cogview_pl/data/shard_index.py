"""Places of the members of all samples of WebDataset shards, in arrays: tuples of millions need too much memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import xxhash

from cogview_pl.data.left_out import LeftOut
from cogview_pl.data.progress import NewProgress
from cogview_pl.data.shard_keys import Members, samples_of
from cogview_pl.data.tar_index import MEBIBYTE, NO_MEMBER, Span, index_shard
from cogview_pl.errors.signals import SIGNALS

IMAGE = "/image"
"""Stands for the extension of the image among the members of a sample; no extension has a slash."""


class ShardIndex:
    """Keys and places of the samples of tar files, in the order of the files.

    Args:
        shards: tar files.
        image_extensions: extensions of images; the image of a sample is its first member with one of them.
        text_extensions: extensions of the other members to keep.
        progress: shows how many shards have been read.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        image_extensions: Collection[str],
        text_extensions: Sequence[str],
        progress: NewProgress,
    ) -> None:
        self.shards = list(shards)
        self.left_out = LeftOut()
        self.extensions: set[str] = set()
        """Extensions of all members of samples."""
        self._image_extensions = image_extensions
        self._longer_keys = 0
        self._first_longer_key = ""
        keys: list[bytes] = []
        shard_of: list[int] = []
        places: dict[str, list[Span]] = {IMAGE: [], **{extension: [] for extension in text_extensions}}
        with progress("index shards", sum(map(_mebibytes, self.shards)), "MiB") as done:
            for shard, path in enumerate(self.shards):
                SIGNALS.check()
                for stem, named in index_shard(path, self.left_out, done).items():
                    for key, members in samples_of(stem, named, image_extensions):
                        keys.append(key.encode("utf-8", "surrogateescape"))
                        shard_of.append(shard)
                        self._add(places, key, members)
                        if key != stem:
                            self._longer_keys += 1
                            self._first_longer_key = self._first_longer_key or key
                        self.extensions.update(members)
        # The keys are concatenated: an array of texts would give each the room of the longest.
        self._key_bytes = b"".join(keys)
        sizes = np.array([len(key) for key in keys], dtype=np.int64)
        self._keys = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
        self._shard_of = np.array(shard_of, dtype=np.int64)
        self._places = {kind: np.array(found).reshape(-1, 2) for kind, found in places.items()}
        self._notes = self._notes_on(keys)

    def __len__(self) -> int:
        return len(self._shard_of)

    def key(self, index: int) -> str:
        """The key of a sample."""
        offset, size = self._keys[index]
        return self._key_bytes[offset : offset + size].decode("utf-8", "surrogateescape")

    def place(self, index: int, kind: str) -> tuple[int, Span]:
        """Shard and place of a member.

        Args:
            index: of the sample.
            kind: `IMAGE` or an extension.
        """
        return int(self._shard_of[index]), Span(*self._places[kind][index])

    def having(self, kind: str, limit: int) -> list[int]:
        """Samples that have a member, at equal distances over all of them.

        Args:
            kind: `IMAGE` or an extension.
            limit: largest number of samples.
        """
        found = np.flatnonzero((self._places[kind] != NO_MEMBER).any(axis=1))
        return found[np.unique(np.linspace(0, len(found) - 1, min(limit, len(found)), dtype=np.int64))].tolist()

    def choose(self, indices: Sequence[int]) -> None:
        """Keep some of the samples, in the given order."""
        rows = np.array(indices, dtype=np.int64)
        self._keys = self._keys[rows]
        self._shard_of = self._shard_of[rows]
        self._places = {kind: found[rows] for kind, found in self._places.items()}

    def notes(self) -> list[str]:
        """What a user should know of all samples and members: a line for each."""
        return self._notes

    def _add(self, places: dict[str, list[Span]], key: str, members: Members) -> None:
        """Append the places of a sample, and count its other members."""
        image = next((extension for extension in members if extension in self._image_extensions), "")
        for kind, found in places.items():
            found.append(members.get(image if kind == IMAGE else kind, NO_MEMBER))
        if len(members) == 1 and image:
            return
        for rest in members:
            if rest == image or rest in places:
                continue
            extension = rest.rpartition(".")[2]
            further = extension in self._image_extensions
            self.left_out.add("further images of a sample" if further else f".{extension}", f"{key}.{rest}")

    def _notes_on(self, keys: list[bytes]) -> list[str]:
        notes = [self.left_out.line("member")]
        if self._longer_keys:
            notes.append(
                f"{self._longer_keys:,} names have dots, such as {self._first_longer_key}; each of them up to its last "
                "dot is a key"
            )
        notes.append(self._repeated(keys))
        return [note for note in notes if note]

    def _repeated(self, keys: list[bytes]) -> str:
        """Such as `2 keys are in several places, such as a in 0.tar and 1.tar; …`; empty where all keys differ."""
        hashes = np.array([xxhash.xxh3_64_intdigest(key) for key in keys], dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if not len(again):
            return ""
        first, second = order[again[0]], order[again[0] + 1]
        shards = [self.shards[self._shard_of[one]] for one in (first, second)]
        return (
            f"{len(again):,} samples have the key of an earlier one, such as {self.key(first)} in {shards[0]} and "
            f"{shards[1]}; all of them are read"
        )


def _mebibytes(path: Path) -> int:
    try:
        return path.stat().st_size // MEBIBYTE
    except OSError:  # reading it says why
        return 0
