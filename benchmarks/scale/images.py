"""Finding images: folders and tar shards, opened for both splits as training opens them. No image is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.scale.measure import Subject

_SIZES = (10_000, 100_000, 1_000_000)
_PER_SHARD = 10_000  # samples
_PER_FOLDER = 1_000  # files
_BLOCK = 512  # bytes of a tar header, and unit of the data after it


def _folder_with_a_list(folder: Path, size: int) -> None:
    """Empty images, and `metadata.jsonl`."""
    with (folder / "metadata.jsonl").open("w") as listing:
        for name in _names(folder, size):
            (folder / name).touch()
            listing.write(json.dumps({"file_name": name, "text": f"a caption of some words, number {name}"}) + "\n")


def _folder_with_text_files(folder: Path, size: int) -> None:
    """Empty images, each with a `.txt` beside it."""
    for name in _names(folder, size):
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(f"a caption of some words, number {name}")


def _names(folder: Path, size: int) -> Iterator[str]:
    for number in range(size):
        inside = f"{number // _PER_FOLDER:05d}"
        if number % _PER_FOLDER == 0:
            (folder / inside).mkdir()
        yield f"{inside}/{number:09d}.jpg"


def _shards(folder: Path, size: int) -> None:
    """Tar files in the form ustar: on each sample an image and a JSON object of one block each."""
    for first in range(0, size, _PER_SHARD):
        with (folder / f"{first // _PER_SHARD:05d}.tar").open("wb") as shard:
            for number in range(first, min(first + _PER_SHARD, size)):
                for extension in ("jpg", "json"):
                    shard.write(_header(f"{number:09d}.{extension}") + bytes(_BLOCK))
            shard.write(bytes(2 * _BLOCK))


def _header(name: str) -> bytes:
    """A header of a member of one block."""
    fields = (name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % _BLOCK)
    start = b"".join(fields) + b"00000000000\0"
    rest = (b"0" + bytes(100) + b"ustar\x0000").ljust(_BLOCK - len(start) - 8, b"\0")
    total = sum(start) + sum(rest) + 8 * ord(" ")
    return start + b"%06o\0 " % total + rest


def _opened_shards(folder: Path, size: int) -> None:
    """Shards that were opened before."""
    _shards(folder, size)
    for shard in folder.glob("*.tar"):
        os.utime(shard, (0, 0))  # indices of files that were just written are not kept
    _open_shards(folder, size)


def _open_folder(folder: Path, size: int) -> None:
    from cogview_pl.data.folder import FolderDataset

    _require([FolderDataset(folder, split, 8, 0.05) for split in ("train", "val")], size)


def _open_shards(folder: Path, size: int) -> None:
    from cogview_pl.data.webdataset import ShardDataset

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    shards = str(folder / "*.tar")
    _require([ShardDataset(shards, split, 8, 0.05, "caption", text_fields=()) for split in ("train", "val")], size)


def _require(splits: list, size: int) -> None:
    if sum(map(len, splits)) != size:
        raise RuntimeError(f"{size:,} samples were made, {sum(map(len, splits)):,} found")


def _imports() -> None:
    import cogview_pl.data.folder
    import cogview_pl.data.webdataset  # noqa: F401


SUBJECTS = (
    Subject("folder with a list", "images", _SIZES, _folder_with_a_list, _open_folder, _imports),
    Subject("folder with text files", "images", _SIZES[:2], _folder_with_text_files, _open_folder, _imports),
    Subject("tar, the first time", "images", _SIZES, _shards, _open_shards, _imports),
    Subject("tar, afterwards", "images", _SIZES, _opened_shards, _open_shards, _imports),
)
