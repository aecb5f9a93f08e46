"""With `val_urls` the splits are those of the shards: nothing is dealt out by hash, and each has what it needs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError

from .shards import read


def shard(file: Path, keys: str, style: str) -> str:
    """A sample for each letter, all of one style."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(file, "w") as tar:
        for key in keys:
            for end, data in (("png", image.getvalue()), ("json", json.dumps({"zh": key, "style": style}).encode())):
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(file)


def opened(split: str, urls: list[str], val_fraction: float = 0.5, **options: object) -> ShardDataset:
    return ShardDataset(urls, split, 8, val_fraction, "zh", style_field="style", **options)  # type: ignore[arg-type]


def keys(data: ShardDataset) -> str:
    return "".join(data.key(index) for index in range(len(data)))


@pytest.fixture
def oil_and_ink(tmp_path: Path) -> tuple[str, str]:
    return shard(tmp_path / "oil.tar", "abcdefgh", "oil"), shard(tmp_path / "ink.tar", "uvwxyz", "ink")


def test_nothing_is_dealt_out_by_hash(oil_and_ink: tuple[str, str]) -> None:
    oil, ink = oil_and_ink
    for fraction in (0.0, 0.5, 1.0):
        assert keys(opened("train", [oil], fraction, val_urls=ink)) == "abcdefgh"
        assert keys(opened("val", [oil], fraction, val_urls=ink)) == "uvwxyz"
    by_hash = [keys(opened(split, [oil])) for split in ("train", "val")]
    assert sorted("".join(by_hash)) == list("abcdefgh") and all(by_hash)


def test_the_share_of_the_hash_counts_only_where_it_is_used(oil_and_ink: tuple[str, str]) -> None:
    """For whether a run that goes on has the same data."""
    oil, ink = oil_and_ink
    for split in ("train", "val"):
        apart = [opened(split, [oil], fraction, val_urls=ink).fingerprint() for fraction in (0.1, 0.5)]
        assert apart[0] == apart[1]
        assert len({opened(split, [oil], fraction).fingerprint() for fraction in (0.1, 0.5)} | {apart[0]}) == 3


def test_a_style_may_be_missing_only_where_samples_are_for_validation_alone(oil_and_ink: tuple[str, str]) -> None:
    oil, ink = oil_and_ink
    missing = r"^data\.styles: no sample has the style 'ink'; data\.style_field=style has: oil$"
    assert keys(opened("val", [ink], styles=["ink", "oil"], val_urls=oil)) == "abcdefgh"
    with pytest.raises(UserError, match=missing):
        opened("train", [oil], styles=["ink"], val_urls=ink)
    for split in ("train", "val"):
        with pytest.raises(UserError, match=missing):
            opened(split, [oil], styles=["ink"])


def test_shards_of_their_own_for_validation(three_shards: Path) -> None:
    urls, val_urls = f"{three_shards}/set-{{000,001}}.tar", f"{three_shards}/set-002.tar"
    train = read(urls, val_urls=val_urls, val_fraction=0.5)
    val = read(urls, split="val", val_urls=[val_urls], val_fraction=0.5)
    assert [train.key(i) for i in range(len(train))] == [f"s{i:04d}" for i in range(20)]
    assert [val.key(i) for i in range(len(val))] == [f"s{i:04d}" for i in range(20, 30)]
    for split in ("train", "val"):
        with pytest.raises(UserError, match=r"^data\.val_urls: \S+set-001\.tar is in data\.urls too"):
            read(urls, split=split, val_urls=f"{three_shards}/*1.tar")
    with pytest.raises(UserError, match=r"^data\.val_urls=\S+: no file matches"):
        read(urls, val_urls=f"{three_shards}/none.tar")
