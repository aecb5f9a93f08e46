"""Styles of an image folder: one folder per style, or a column."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError

from .image_folders import PATTERNS, captioned, folder, listing, one_line


@pytest.fixture
def two_styles(tmp_path: Path) -> dict[str, str]:
    names = [f"{i}.png" for i in range(40)]
    return {style: str(captioned(tmp_path / name, names)) for style, name in (("油画", "oil"), ("素描", "sketch"))}


def test_one_folder_per_style(two_styles: dict[str, str]) -> None:
    dataset = FolderDataset(None, "train", 4, 0.0, styles=two_styles, style_patterns=PATTERNS)
    assert len(dataset) == 80
    used: Counter[str] = Counter()
    for i in range(80):
        sample = dataset[i]
        assert isinstance(sample, ImageSample)
        style, _, file = sample.key.partition("/")
        wanted = [pattern.format(text=f"图{file}", style=style) for pattern in PATTERNS]
        assert sample.text == dataset.text(i) in wanted
        used[PATTERNS[wanted.index(sample.text)]] += 1
    assert min(used[pattern] for pattern in PATTERNS) > 20
    assert {dataset.key(i).partition("/")[0] for i in range(80)} == {"油画", "素描"}


def test_a_sample_keeps_its_pattern_when_others_go(two_styles: dict[str, str]) -> None:
    whole = FolderDataset(None, "train", 4, 0.0, styles=two_styles, style_patterns=PATTERNS)
    texts = {whole.key(i): whole.text(i) for i in range(len(whole))}
    part = FolderDataset(None, "train", 4, 0.5, styles={"素描": two_styles["素描"]}, style_patterns=PATTERNS)
    assert 0 < len(part) < 40
    assert all(texts[part.key(i)] == part.text(i) for i in range(len(part)))
    # The hash that chooses the pattern is not that of the split.
    assert len({part.text(i)[:2] == "素描" for i in range(len(part))}) == 2


def test_each_style_is_split_like_its_folder_alone(two_styles: dict[str, str]) -> None:
    for split in ("train", "val"):
        styled = FolderDataset(None, split, 4, 0.25, styles=two_styles)
        keys = [styled.key(i) for i in range(len(styled))]
        for style, root in two_styles.items():
            alone = FolderDataset(root, split, 4, 0.25)
            assert [key for key in keys if key.startswith(style)] == [
                f"{style}/{alone.key(i)}" for i in range(len(alone))
            ]
    assert FolderDataset(None, "val", 4, 0.25, styles=two_styles).text(0).startswith("图")  # no patterns


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv"])
def test_a_column_with_the_style(tmp_path: Path, name: str) -> None:
    rows = [("a.png", "猫", "油画"), ("b.png", "狗", " 素描 "), ("c.png", "鱼", "")]
    fields = ("file_name", "text", "medium")
    lines = [json.dumps(dict(zip(fields, row, strict=True)), ensure_ascii=False) for row in rows]
    if name.endswith("csv"):
        lines = [",".join(row) for row in (fields, *rows)]
    listing(folder(tmp_path, [row[0] for row in rows]), name, "\n".join(lines))
    dataset = FolderDataset(tmp_path, "train", 4, 0.0, style_field="medium", style_patterns=("{style}风格的{text}",))
    assert dataset.texts() == ["油画风格的猫", "素描风格的狗", ""]
    assert [dataset[0].text, dataset[1].text] == dataset.texts()[:2]
    assert dataset[2] == Skipped("c.png", "the style is empty")
    assert FolderDataset(tmp_path, "train", 4, 0.0).texts() == ["猫", "狗", "鱼"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, r"data\.root has no value; set it to .*, or data\.styles to one folder per style"),
        ({"styles": {"油画": "ROOT"}}, r"data\.root=\S+ and data\.styles are both given"),
        (
            {"root": None, "styles": {"油画": "ROOT/gone"}},
            r"data\.styles\.油画=\S+gone does not exist; set it to a folder",
        ),
        (
            {"root": None, "styles": {"油画": "ROOT", "素描": "ROOT/bare"}},
            r"data\.styles\.素描=\S+bare has no captions",
        ),
        ({"root": None, "styles": {"油画": None}}, r"data\.styles=\{.*None\}: give one folder per style"),
        ({"root": None, "styles": {"油画": "ROOT"}, "style_field": "x"}, r"data\.style_field=x: data\.styles names"),
        ({"style_patterns": PATTERNS}, r"data\.style_patterns: the images have no styles; set data\.styles"),
        ({"style_field": "medium"}, r"csv:2 has no field medium; set data\.style_field to one of: file_name, text"),
        ({"root": "ROOT/beside", "style_field": "x"}, r"data\.style_field=x: data\.root=\S+ has its captions in \.txt"),
    ],
)
def test_what_is_wrong_with_styles(tmp_path: Path, options: dict[str, object], message: str) -> None:
    captioned(tmp_path, ["a.png"])
    folder(tmp_path, ["bare/a.png", "beside/a.png"])
    listing(tmp_path, "beside/a.txt", "猫")

    def placed(value: object) -> object:
        if isinstance(value, dict):
            return {key: placed(inner) for key, inner in value.items()}
        return value.replace("ROOT", str(tmp_path)) if isinstance(value, str) else value

    options = {"root": "ROOT", "split": "train", "image_size": 4, "val_fraction": 0.0} | options
    with pytest.raises(UserError, match=message) as error:
        FolderDataset(**{key: placed(value) for key, value in options.items()})  # type: ignore[arg-type]
    one_line(error)
