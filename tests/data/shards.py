"""Tar shards for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from cogview_pl.data.samples import ImageSample
from cogview_pl.data.webdataset import ShardDataset


def image(colour: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, colour, colour)).save(stream, form, lossless=True)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered(start: int, stop: int) -> dict[str, bytes]:
    """Samples s0000, s0001, …, whose grey level is their number."""
    members = {}
    for number in range(start, stop):
        members[f"s{number:04d}.png"] = image(number)
        members[f"s{number:04d}.json"] = json.dumps({"zh": f"图{number}", "more": [f"甲{number}", "乙"]}).encode()
    return members


def read(urls: str | list[str] | Path, field: str = "zh", split: str = "train", **options: object) -> ShardDataset:
    urls = str(urls) if isinstance(urls, Path) else urls
    return ShardDataset(urls, split, 8, options.pop("val_fraction", 0.0), field, **options)  # type: ignore[arg-type]


def readable(dataset: ShardDataset) -> list[ImageSample]:
    samples = [dataset[i] for i in range(len(dataset))]
    good = [sample for sample in samples if isinstance(sample, ImageSample)]
    assert len(good) == len(samples)
    return good


def level(sample: ImageSample) -> int:
    return int(sample.image[0, 0, 0])


def keys(dataset: ShardDataset) -> list[str]:
    return [dataset.key(i) for i in range(len(dataset))]
