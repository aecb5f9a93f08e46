"""Indices of shards that are kept between runs: when they count, and when shards are read anew."""

from __future__ import annotations

import os
import pickle
import random
import time
from pathlib import Path

import pytest

from cogview_pl.data.images import split_indices
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError

from .shards import image, keys, numbered, read, readable, write_tar


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cogview_pl" / "shards"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return settled(
        write_tar(tmp_path / "a.tar", {"样本/长.png": image(7), "样本/长.json": b'{"zh": "x"}'} | numbered(0, 20))
    )


def settled(shard: Path, seconds: int = 100) -> Path:
    """A file that was written some time ago."""
    os.utime(shard, (time.time() - seconds,) * 2)
    return shard


def seen(dataset: ShardDataset) -> list[object]:
    return [[tuple(map(str, sample)) for sample in readable(dataset)], dataset.notes()]


def spoil_first_header(shard: Path) -> None:
    """Damage a header, and leave size and time as they were."""
    found = shard.stat()
    with shard.open("r+b") as stream:
        stream.write(b"damaged")
    os.utime(shard, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_headers_are_read_once(cache: Path, shard: Path) -> None:
    before = seen(read(shard))
    spoil_first_header(shard)
    assert seen(read(shard)) == before
    os.utime(shard)
    with pytest.raises(UserError, match=r"a\.tar is not an uncompressed tar file"):
        read(shard)


def test_both_splits_need_one_index_where_none_can_be_kept(cache: Path, shard: Path) -> None:
    (cache.parent.parent).write_text("a file where the folder of caches should be")
    train = read(shard, val_fraction=0.3)
    spoil_first_header(shard)
    val = read(shard, split="val", val_fraction=0.3)
    assert sorted(keys(train) + keys(val)) == sorted([f"s{number:04d}" for number in range(20)] + ["样本/长"])
    del train, val
    with pytest.raises(UserError, match=r"a\.tar is not an uncompressed tar file"):
        read(shard)


def test_a_shard_that_has_changed_is_read_anew(cache: Path, shard: Path) -> None:
    assert len(read(shard)) == 21
    shard.write_bytes(shard.read_bytes() + write_tar(shard.parent / "b", numbered(30, 33)).read_bytes())
    assert len(read(settled(shard, 90))) == 24
    before = shard.stat()
    for first in (60, 40):
        write_tar(shard, numbered(first, first + 20))
        later = before.st_mtime_ns + first
        os.utime(shard, ns=(later, later))
        assert keys(read(shard)) == [f"s{number:04d}" for number in range(first, first + 20)]
    assert len(list(cache.iterdir())) == 1  # of each shard the last


def test_a_shard_that_was_just_written_may_change_within_the_same_tick(cache: Path, shard: Path) -> None:
    os.utime(shard)
    assert len(read(shard)) == 21
    assert not cache.exists()


def test_a_damaged_index_is_said_and_the_shard_read_anew(
    cache: Path, shard: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = seen(read(shard))
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    random_ = random.Random(0)
    flipped = [(place, bytes([whole[place] ^ 1])) for place in random_.sample(range(len(whole)), 20)]
    damaged = [whole[:place] + byte + whole[place + 1 :] for place, byte in flipped]
    for content in (*damaged, b"", whole[:-1], whole + b"\0", whole[16:]):
        kept.write_bytes(content)
        caplog.clear()
        assert seen(read(shard)) == before
        assert caplog.messages == [f"{kept}, the kept index of {shard}, is damaged; the shard is read anew"]
        assert kept.read_bytes() == whole


def test_an_index_that_was_kept_says_the_same_of_other_members(cache: Path, tmp_path: Path) -> None:
    """Notes, samples and places do not depend on whether headers or kept indices are read, nor on the text fields."""
    members = {
        "a.png": image(1), "a.txt": "甲".encode(), "a.json": b'{"zh": "x"}', "a.PNG": image(2), "README": b"",
        "scan.0.png": image(3), "scan.0.txt": b"z", "scan.0.json": b'{"zh": "y"}', "scan.1.png": image(4),
        ".hidden.png": b"", "b.png": image(5), "b.json": b'{"zh": "b"}', "a.jpg": image(6),
    }  # fmt: skip
    shard = settled(write_tar(tmp_path / "a.tar", members))
    for field in ("zh", "txt"):
        (cache / "none").mkdir(parents=True, exist_ok=True)
        for kept in cache.glob("*.index"):
            kept.unlink()
        first = read(shard, field)
        expected = (keys(first), first.notes(), [str(first[index]) for index in range(len(first))])
        del first
        again = read(shard, field)
        assert (keys(again), again.notes(), [str(again[index]) for index in range(len(again))]) == expected
        assert len(expected[0]) == 4


def test_samples_take_less_than_a_tenth_of_a_kilobyte(tmp_path: Path) -> None:
    """In memory, and in what a spawned worker is sent; one long key costs its own length only."""
    long = "长" * 70
    members = {f"{number:09d}.png": b"" for number in range(3000)} | {f"{long}.png": b""}
    dataset = read(write_tar(tmp_path / "a.tar", members), text_fields=())
    assert len(pickle.dumps(dataset)) / 3000 < 60
    assert dataset.key(3000) == long


def test_splits_are_by_the_hash_of_the_key(cache: Path, tmp_path: Path) -> None:
    names = [f"{'样' * (number % 3)}{number}" for number in range(100)] + ["\udcff1", "\udce4"]
    shard = settled(write_tar(tmp_path / "a.tar", {f"{name}.png": b"" for name in names}))
    for _ in range(2):
        val = keys(read(shard, split="val", val_fraction=0.2, text_fields=()))
        assert val == [names[index] for index in split_indices(names, "val", 0.2)]
