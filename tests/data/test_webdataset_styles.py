"""Styles of WebDataset shards: a field of each sample's JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogview_pl.data.samples import Skipped
from cogview_pl.errors import UserError

from .shards import image, keys, level, numbered, read, readable, write_tar


@pytest.fixture
def styled(tmp_path: Path) -> str:
    """Twelve samples in two shards: the even ones in oil, the odd ones sketches."""
    for shard in range(2):
        members = numbered(6 * shard, 6 * shard + 6)
        for name in [name for name in members if name.endswith("json")]:
            number = int(name[1:5])
            fields = {"zh": f"图{number}", "medium": ("油画", "素描")[number % 2]}
            members[name] = json.dumps(fields).encode()
            members[name.replace("json", "txt")] = f"文{number}".encode()
        write_tar(tmp_path / f"styled-{shard}.tar", members)
    return f"{tmp_path}/styled-*.tar"


PATTERN = "{style}风格的{text}"


@pytest.mark.parametrize(("field", "sign"), [("zh", "图"), ("txt", "文")])
def test_the_style_comes_from_its_field(styled: str, field: str, sign: str) -> None:
    dataset = read(styled, field, style_field="medium", style_patterns=[PATTERN])
    expected = [f"{'油画' if i % 2 == 0 else '素描'}风格的{sign}{i}" for i in range(12)]
    assert dataset.texts() == [sample.text for sample in readable(dataset)] == expected
    assert read(styled, field, style_field="medium").texts() == [f"{sign}{i}" for i in range(12)]


def test_only_the_styles_asked_for_are_kept(styled: str) -> None:
    options = {"style_field": "medium", "styles": ["素描"], "style_patterns": [PATTERN]}
    dataset = read(styled, **options)
    assert keys(dataset) == [f"s{i:04d}" for i in range(1, 12, 2)]
    assert [level(sample) for sample in readable(dataset)] == list(range(1, 12, 2))
    assert dataset.text(5) == "素描风格的图11"
    parts = [read(styled, split=split, val_fraction=0.4, **options) for split in ("train", "val")]
    assert sorted(keys(parts[0]) + keys(parts[1])) == keys(dataset)
    assert len(read(styled, style_field="medium", styles=["油画", "素描"])) == 12


def test_a_sample_without_a_style_is_left_out_or_skipped(tmp_path: Path) -> None:
    members = numbered(0, 4)
    for number, fields in enumerate(('"medium": "油画"', '"medium": null', '"medium": 3', '"x": 1')):
        members[f"s{number:04d}.json"] = f'{{"zh": "图", {fields}}}'.encode()
    file = write_tar(tmp_path / "a.tar", members)
    dataset = read(file, style_field="medium", style_patterns=[PATTERN])
    assert dataset.texts() == ["油画风格的图", "", "", ""]
    reasons = ["the style is empty", "the style is not text but 3", "the style is empty"]
    assert [dataset[i] for i in range(1, 4)] == [Skipped(f"s{i + 1:04d}", why) for i, why in enumerate(reasons)]
    assert keys(read(file, style_field="medium", styles=["油画"])) == ["s0000", "s0002"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style_patterns": [PATTERN]}, r"^data\.style_patterns is given without data\.style_field; set that"),
        ({"styles": ["油画"]}, r"^data\.styles is given without data\.style_field"),
        ({"style_field": "x"}, r"^data\.style_field=x: no such field .* set it to one of: zh, medium$"),
        (
            {"style_field": "medium", "styles": ["油画", "水墨"]},
            r"^data\.styles: no sample has the style '水墨'; data\.style_field=medium has: 油画, 素描$",
        ),
    ],
)
def test_what_is_wrong_with_styles(styled: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(styled, **options)


def test_validation_shards_may_lack_a_style(styled: str, tmp_path: Path) -> None:
    only = write_tar(tmp_path / "val.tar", {"v.png": image(7), "v.json": '{"zh": "t", "medium": "素描"}'.encode()})
    options = {"style_field": "medium", "styles": ["油画", "素描"], "val_urls": str(only)}
    assert [len(read(styled, split=split, **options)) for split in ("train", "val")] == [12, 1]


def test_smaller_images_are_skipped(styled: str) -> None:
    assert read(styled, min_size=9)[0] == Skipped("s0000", "8x8 is smaller than data.min_size=9")


# --- splits
