"""Images without captions, as the training of the image tokenizer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError

from .image_folders import folder, listing
from .shards import image, keys, read, readable, write_tar

NAMES = [f"s/{number:02d}.png" for number in range(12)]


def alone(root: Path, split: str = "train", fraction: float = 0.0, **options: Any) -> FolderDataset:
    return FolderDataset(root, split, 4, fraction, text_fields=(), **options)


def keys_of(dataset: FolderDataset) -> list[str]:
    return [dataset.key(index) for index in range(len(dataset))]


def test_a_folder_without_captions(tmp_path: Path) -> None:
    found = alone(folder(tmp_path, NAMES))
    assert keys_of(found) == NAMES
    sample = found[3]
    assert isinstance(sample, ImageSample)
    assert (sample.key, sample.text, sample.fields) == ("s/03.png", "", {})
    assert sample.image[:, 0, 0].tolist() == [255, 0, 0]


def test_a_missing_or_bad_caption_is_no_unreadable_image(tmp_path: Path) -> None:
    folder(tmp_path, NAMES[:3])
    listing(tmp_path / "s", "00.txt", "图")
    listing(tmp_path / "s", "01.txt", "图", "gbk")
    assert [type(sample) for sample in map(alone(tmp_path).__getitem__, range(3))] == [ImageSample] * 3


def test_images_have_the_same_side_of_the_split_with_and_without_captions(tmp_path: Path) -> None:
    folder(tmp_path, NAMES)
    for name in NAMES:
        listing(tmp_path, name.replace("png", "txt"), "图")
    for split in ("train", "val"):
        assert keys_of(alone(tmp_path, split, 0.4)) == keys_of(FolderDataset(tmp_path, split, 4, 0.4))


def test_a_list_without_captions_chooses_the_images(tmp_path: Path) -> None:
    folder(tmp_path, NAMES[:2])
    listing(tmp_path, "metadata.jsonl", '{"file_name": "s/01.png"}\n{"file_name": "gone.png", "text": 3}\n')
    found = alone(tmp_path)
    assert isinstance(found[0], ImageSample)
    assert found[1] == Skipped("gone.png", "file not found")


def test_styles_are_for_captions(tmp_path: Path) -> None:
    found = alone(folder(tmp_path, NAMES), style_field="medium", style_patterns=["{style}:{text}"])
    assert isinstance(found[0], ImageSample)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.root=\S* holds no images; set it to a folder of images$"):
        alone(tmp_path)


def test_shards_without_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"{number}.png": image(number) for number in range(5)})
    found = read(tmp_path / "0.tar", text_fields=(), style_field="medium", style_patterns=["{style}:{text}"])
    assert keys(found) == list("01234")
    assert [sample.text for sample in readable(found)] == [""] * 5
