"""Several captions of one image: which counts, and which texts are empty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cogview_pl.data.captions import CaptionError, caption_lines, field_texts, visible
from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped

from .image_folders import PATTERNS, folder, listing
from .shards import image, read, write_tar

NAMES = [f"{number:02d}.png" for number in range(24)]
THREE = ["一", "二", "三"]


def data(
    root: Path, captions: str = "first", split: str = "train", fraction: float = 0.0, **more: Any
) -> FolderDataset:
    return FolderDataset(root, split, 4, fraction, captions=captions, **more)


def found(dataset: Any) -> list[tuple[str, str]]:
    samples = [dataset[index] for index in range(len(dataset))]
    assert [dataset.text(index) for index in range(len(dataset))] == [sample.text for sample in samples]
    return [(sample.key, sample.text) for sample in samples]


@pytest.fixture(params=["lines", "list", "shard"])
def open_as(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """24 images with three captions each: lines of a .txt, a JSON list, a JSON list in a shard."""
    if request.param == "shard":
        members = {}
        for name in NAMES:
            members[name] = image(9)
            members[name.replace("png", "json")] = json.dumps({"zh": THREE}).encode()
        write_tar(tmp_path / "0.tar", members)
        return lambda captions, **more: read(tmp_path / "0.tar", captions=captions, **more)
    folder(tmp_path, NAMES)
    if request.param == "list":
        rows = [json.dumps({"file_name": name, "text": THREE}) for name in NAMES]
        listing(tmp_path, "metadata.jsonl", "\n".join(rows))
    else:
        for name in NAMES:
            listing(tmp_path, name.replace("png", "txt"), "一\r\n\r\n二\n \n三\n")
    return lambda captions, **more: data(tmp_path, captions, **more)


def test_first_random_and_all(open_as: Any) -> None:
    names = [key for key, _ in found(open_as("first"))]
    assert [name.removesuffix(".png") for name in names] == [name.removesuffix(".png") for name in NAMES]
    assert {text for _, text in found(open_as("first"))} == {"一"}
    assert found(open_as("all")) == [(name, text) for name in names for text in THREE]
    random = found(open_as("random"))
    assert [key for key, _ in random] == names and {text for _, text in random} == set(THREE)
    assert found(open_as("random")) == random != found(open_as("random", caption_seed=1))


def test_the_choice_is_part_of_the_fingerprint(open_as: Any) -> None:
    prints = [open_as(*way, **seed).fingerprint() for way, seed in (
        (("first",), {}), (("all",), {}), (("random",), {}), (("random",), {"caption_seed": 1})
    )]  # fmt: skip
    assert len(set(prints)) == 4
    assert open_as("first", caption_seed=1).fingerprint() == prints[0]


def test_captions_of_an_image_share_their_side_of_the_split(tmp_path: Path) -> None:
    folder(tmp_path, NAMES)
    listing(tmp_path, "metadata.jsonl", "\n".join(json.dumps({"path": n, "text": THREE}) for n in NAMES))
    sides = [{key for key, _ in found(data(tmp_path, "all", split, 0.3))} for split in ("train", "val")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(NAMES)
    alone = [data(tmp_path, "first", split, 0.3) for split in ("train", "val")]
    assert [{one.key(index) for index in range(len(one))} for one in alone] == sides


def test_the_default_is_said_aloud(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png", "b.png"])
    listing(tmp_path, "a.txt", "一\n二")
    listing(tmp_path, "b.txt", "三")
    assert data(tmp_path).notes()[-1] == (
        f"data.root={tmp_path}: 1 image has several captions, 2 in all; the first counts "
        "(data.captions=first; first, random or all)"
    )


def test_styles_are_named_in_each_caption(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png"])
    listing(tmp_path, "metadata.jsonl", json.dumps({"path": "a.png", "text": THREE, "medium": "油画"}))
    texts = data(tmp_path, "all", style_field="medium", style_patterns=PATTERNS[:1]).texts()
    assert texts == ["一的油画图像", "二的油画图像", "三的油画图像"]


# --- empty and bad texts


@pytest.mark.parametrize("text", ["", " \t", "\u3000", "\u200b", "\u200b\ufeff \u200d", "\x01\x02", "\u2028"])
def test_a_text_without_a_visible_character_is_empty(text: str) -> None:
    assert visible(text) == "" and caption_lines(f"{text}\n猫\n{text}") == ["猫"]
    assert field_texts([text, "猫"]) == ["猫"] and field_texts(text) == []


@pytest.mark.parametrize("text", ["红\u200b猫", "❤\ufe0f", "。", "\u200d猫", "👨\u200d👩"])
def test_a_visible_text_stays_as_it_is(text: str) -> None:
    assert visible(f" {text}\n") == text


def test_a_usable_caption_counts_whatever_stands_before_it(tmp_path: Path) -> None:
    assert field_texts([None, "", 3, " 猫 ", "狗"]) == ["猫", "狗"]
    with pytest.raises(CaptionError, match="not text but 3"):
        field_texts([None, 3])
    folder(tmp_path, ["a.png", "b.png"])
    rows = [{"path": "a.png", "text": ["\u200b", "猫"]}, {"path": "b.png", "text": ["\u200b"]}]
    listing(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = data(tmp_path)
    assert isinstance(dataset[0], ImageSample) and dataset[0].text == "猫"
    assert dataset[1] == Skipped("b.png", "the caption is empty")


def test_bad_captions_are_skipped_samples_with_their_reason(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(6)]
    folder(tmp_path, names)
    texts: list[Any] = ["猫", 2024, float("nan"), {"a": 1}, "狗"]
    rows = [{"path": name, "text": text} for name, text in zip(names, texts, strict=False)] + [{"path": "5.png"}]
    listing(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = data(tmp_path)
    assert dataset.texts() == ["猫", "", "", "", "狗", ""]
    reasons = [sample.reason for sample in map(dataset.__getitem__, (1, 2, 3, 5)) if isinstance(sample, Skipped)]
    where = f"{tmp_path}/metadata.jsonl"
    assert reasons == [
        f"{where}:{line}, text: the caption is not text but {value}; mend the line or set data.caption_field"
        for line, value in ((2, "2024"), (3, "NaN"), (4, '{"a": 1}'))
    ] + [f"{where}:6 has no field text or caption; set data.caption_field to one of: path"]


def test_a_caption_file_in_another_encoding_than_the_others_is_skipped(tmp_path: Path) -> None:
    folder(tmp_path, names := [f"{number}.png" for number in range(4)])
    for name, encoding in zip(names, ("utf-8", "utf-8-sig", "utf-16", "gbk"), strict=True):
        listing(tmp_path, name.replace("png", "txt"), "一只红色的猫", encoding)
    dataset = data(tmp_path)
    assert dataset.texts() == ["一只红色的猫"] * 3 + [""]
    assert dataset[3] == Skipped("3.png", "3.txt is not UTF-8 text but GB18030, unlike most; save it as UTF-8")


def test_caption_files_that_are_all_gbk_are_read_and_said(tmp_path: Path) -> None:
    folder(tmp_path, names := [f"{number}.png" for number in range(4)])
    for name in names:
        listing(tmp_path, name.replace("png", "txt"), f"第{name[0]}只红色的猫", "gbk")
    dataset = data(tmp_path)
    assert dataset.texts() == [f"第{number}只红色的猫" for number in range(4)]
    assert dataset.notes() == [f"data.root={tmp_path}: captions are the .txt files beside the images (GB18030: 4)"]
