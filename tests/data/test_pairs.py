"""Pairs of image files: the same image in two styles, found by names or by a field, with the style as instruction."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cogview_pl.assembly.image_data import open_images
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.errors import UserError

from ..composed import composed
from .image_folders import one_line
from .shards import image, write_tar

LEVELS = {"油画": 10, "素描": 100, "照片": 200}
"""Grey level of the images of each style; the number of an image is added."""
INSTRUCTION = "data.style_patterns=[画成{style}]"


def opened(*words: str, split: str = "train") -> CaptionedImages:
    data = composed("task=style_transfer", "data.image_size=8", INSTRUCTION, *words).data
    return open_images(data, split, image_fields=("source",))


def pairs(images: CaptionedImages) -> list[tuple[int, int, str]]:
    """Grey levels of source and target, and the instruction."""
    found = []
    for index in range(len(images)):
        sample = images[index]
        assert isinstance(sample, ImageSample) and sample.key == images.key(index)
        assert sample.text == images.text(index) and list(sample.images) == ["source"]
        found.append((int(sample.images["source"][0, 0, 0]), int(sample.image[0, 0, 0]), sample.text))
    return found


@pytest.fixture
def folders(tmp_path: Path) -> str:
    """Images 0 to 9 in oil, 0 to 8 as sketches, which are JPEGs; `data.styles` of them."""
    for style, count, extension in (("油画", 10, "png"), ("素描", 9, "bmp")):
        (tmp_path / style).mkdir()
        for number in range(count):
            grey = (LEVELS[style] + number,) * 3
            Image.new("RGB", (8, 8), grey).save(tmp_path / style / f"{number}.{extension}")
    return f"data.styles={{油画: {tmp_path}/油画, 素描: {tmp_path}/素描}}"


def test_equal_names_in_two_folders(folders: str) -> None:
    images = opened("data=folder", folders, "data.val_fraction=0")
    oil, sketch = LEVELS["油画"], LEVELS["素描"]
    expected = [(sketch + n, oil + n, "画成油画") for n in range(9)] + [
        (oil + n, sketch + n, "画成素描") for n in range(9)
    ]
    assert sorted(pairs(images)) == sorted(expected)
    assert images.key(0) == "油画/0.png from 素描/0.bmp"
    assert any("1 images have no partner" in note for note in images.notes())


def test_both_directions_of_a_pair_are_in_one_split(folders: str) -> None:
    parts = [pairs(opened("data=folder", folders, "data.val_fraction=0.4", split=split)) for split in ("train", "val")]
    numbers = [{min(one, other) for one, other, _ in part} for part in parts]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]
    assert len(parts[0]) + len(parts[1]) == 18 and all(
        len(part) == 2 * len(n) for part, n in zip(parts, numbers, strict=True)
    )


def listed(root: Path, rows: list[dict[str, Any]]) -> str:
    """A folder with a list of images, whose grey level is that of the style plus the number of the row."""
    for number, row in enumerate(rows):
        grey = (LEVELS.get(row["style"], 0) + number,) * 3
        Image.new("RGB", (8, 8), grey).save(root / row["file_name"])
    with (root / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return f"data.root={root}"


BY_FIELD = ("data=folder", "data.style_field=style", "data.pair_field=concept", "data.val_fraction=0")


def test_a_field_that_images_share(tmp_path: Path) -> None:
    named = [("猫", "油画"), ("狗", "油画"), ("猫", "素描"), ("猫", "照片"), ("狗", "素描"), ("猫", "油画")]
    rows = [{"file_name": f"{n}.png", "concept": c, "style": s} for n, (c, s) in enumerate(named)]
    found = pairs(opened(*BY_FIELD, listed(tmp_path, rows)))
    by_number = [(source % 10, target % 10, text) for source, target, text in found]
    assert by_number == [
        *[(3, 0, "画成油画"), (2, 0, "画成油画")],  # 照片 and 素描 of the cat, in the order of their names
        (4, 1, "画成油画"),
        *[(0, 2, "画成素描"), (3, 2, "画成素描")],
        *[(0, 3, "画成照片"), (2, 3, "画成照片")],
        (1, 4, "画成素描"),
        *[(3, 5, "画成油画"), (2, 5, "画成油画")],  # the second cat in oil: there is one sketch to begin again with
    ]


def test_what_lacks_a_field_is_bad_and_an_unreadable_image_is_skipped(tmp_path: Path) -> None:
    rows = [{"file_name": f"{n}.png", "concept": "猫", "style": s} for n, s in enumerate(("油画", "素描", ""))]
    root = listed(tmp_path, rows)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 2 samples of 2 can be used"):
        opened(*BY_FIELD, root)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    images = opened(*BY_FIELD, root)
    assert list(images.known_bad()) == [Skipped("2.png", "it has no concept or style")]
    (tmp_path / "1.png").write_bytes(b"no image")
    skipped = images[0]
    assert isinstance(skipped, Skipped) and skipped.key == "0.png from 1.png" and skipped.reason.startswith("1.png: ")


def test_shards_of_two_styles(tmp_path: Path) -> None:
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        members = {}
        for number in numbers:
            for style in ("油画", "素描"):
                members[f"{style}_{number}.png"] = image(LEVELS[style] + number)
                members[f"{style}_{number}.json"] = f'{{"concept": "{number}", "style": "{style}"}}'.encode()
        write_tar(tmp_path / f"{split}.tar", members)
    words = ("data=webdataset", f"data.urls={tmp_path}/train.tar", f"data.val_urls={tmp_path}/val.tar")
    by = ("data.style_field=style", "data.pair_field=concept")
    oil, sketch = LEVELS["油画"], LEVELS["素描"]
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        both = [
            pair for n in numbers for pair in ((sketch + n, oil + n, "画成油画"), (oil + n, sketch + n, "画成素描"))
        ]
        assert sorted(pairs(opened(*words, *by, split=split))) == sorted(both)
    with pytest.raises(UserError, match=r"data\.pair_field=concpt: no such field .*concept, style"):
        opened(*words, "data.style_field=style", "data.pair_field=concpt")


def test_a_change_of_the_pairs_changes_the_fingerprint(folders: str) -> None:
    words = ("data=folder", folders)
    found = [opened(*words, *more).fingerprint() for more in ((), (), ("data.style_patterns=[{style}]",))]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("data.styles={油画: ROOT/油画}",),
            r"^data\.pair_field=null: all images have the style 油画, and a pair needs",
        ),
        (("data.root=ROOT/油画",), r"^data\.pair_field=null: no image has a style; set data\.styles"),
        (("STYLES", "data.style_patterns=[]"), r"^data\.style_patterns is empty, and captions of pairs name the style"),
        (
            ("STYLES", "data.style_patterns=[{text}的{style}]"),
            r"'\{text\}的\{style\}' must have the hole \{style\} and no oth",
        ),
        (("STYLES", "data.flip=true"), r"^data\.crop=random, data\.flip and data\.zoom would cut the images of a pair"),
        (
            ("data.styles={油画: ROOT/油画, 照片: ROOT/other}",),
            r"no two images of 2 styles have the same file name \(油画 has",
        ),
    ],
)
def test_what_makes_no_pairs(folders: str, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "a.png")
    given = [folders if word == "STYLES" else word.replace("ROOT", str(tmp_path)) for word in words]
    with pytest.raises(UserError, match=message) as error:
        opened("data=folder", *given)
    one_line(error)


def test_a_layout_with_two_sources_or_another_name() -> None:
    data = composed("task=style_transfer").data
    for names in (("photo",), ("source", "photo")):
        with pytest.raises(UserError, match=r"pairs have one further image, source, the layout has .*photo"):
            open_images(data, "train", image_fields=names)


def test_images_of_a_pair_have_one_size(folders: str) -> None:
    for index in range(2):
        sample = opened("data=folder", folders)[index]
        assert isinstance(sample, ImageSample)
        assert sample.image.shape == sample.image_of("source").shape == torch.Size([3, 8, 8])
        with pytest.raises(UserError, match="has no image mask, a slot of"):
            sample.image_of("mask")
