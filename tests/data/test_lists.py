"""Lists as people have them: encodings, separators, headers, quotes, and what else lies in a folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.errors import UserError

from .image_folders import folder, holes, listing
from .shards import image

NAMES = ("红猫.png", "蓝狗.png", "绿鸟.png")
TEXTS = ("一只红色的猫，坐着", "一条蓝色的狗", "一只绿色的鸟")
ROWS = tuple(zip(NAMES, TEXTS, strict=True))
CSV = "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in ROWS)


def data(root: Path | None, **options: Any) -> FolderDataset:
    return FolderDataset(root, "train", 4, 0.0, **options)


def found(dataset: FolderDataset) -> list[tuple[str, str]]:
    """Key and caption of each sample; each must be readable, and red."""
    samples = [dataset[index] for index in range(len(dataset))]
    for sample in samples:
        assert isinstance(sample, ImageSample), sample
        assert sample.image[:, 0, 0].tolist() == [255, 0, 0]
    return [(sample.key, sample.text) for sample in samples]  # type: ignore[union-attr]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", list(NAMES))


@pytest.mark.parametrize(
    ("name", "content", "encoding", "said"),
    [
        ("metadata.csv", CSV, "utf-8", ""),
        ("metadata.csv", CSV.replace("\n", "\r\n"), "utf-8-sig", ""),
        ("metadata.csv", CSV, "gbk", " (GB18030)"),
        ("metadata.csv", CSV.replace("鸟\n", "鸟😀\n"), "gb18030", " (GB18030)"),
        ("metadata.csv", CSV.replace(",", "\t"), "utf-16", " (UTF-16, separator tab)"),
        ("metadata.tsv", CSV.replace(",", "\t"), "utf-16-le", " (UTF-16)"),
        ("captions.tsv", CSV.replace(",", "\t"), "utf-16-be", " (UTF-16)"),
        ("metadata.csv", CSV.replace(",", ";"), "utf-8-sig", " (separator ;)"),
        ("metadata.csv", CSV.replace(",", "|"), "utf-8", " (separator |)"),
        ("metadata.csv", CSV.replace(",", "\t"), "utf-8", " (separator tab)"),
        ("metadata.tsv", CSV, "utf-8", " (separator ,)"),
        ("metadata.csv", CSV.replace("file_name,text", "File_Name,TEXT"), "utf-8", ""),
        ("metadata.csv", CSV.partition("\n")[2], "utf-8", " (without a header: file, then caption)"),
        ("metadata.csv", CSV.replace("\n", ",,\n") + ",,,\n,,,\n", "utf-8", ""),
        (
            "metadata.csv",
            CSV.replace(",", ", ").replace("，坐着", '，坐着"').replace(" 一只红", ' "一只红'),
            "utf-8",
            "",
        ),
        ("metadata.csv", ",file_name,text\n" + "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(ROWS)), "utf-8", ""),
        ("metadata.jsonl", json.dumps([{"path": a, "text": b} for a, b in ROWS], indent=1), "utf-8", ""),
        ("metadata.json", json.dumps([{"path": a, "text": b} for a, b in ROWS]), "utf-8-sig", ""),
        ("captions.json", json.dumps(dict(ROWS)), "utf-8", ""),
    ],
)
def test_encodings_separators_and_headers(root: Path, name: str, content: str, encoding: str, said: str) -> None:
    (root / name).write_bytes(content.encode(encoding))
    dataset = data(root)
    texts = [text.removesuffix("😀") for text in dataset.texts()]
    assert list(zip([key for key, _ in found(dataset)], texts, strict=True)) == list(ROWS)
    field = "TEXT" if "TEXT" in content else "text"
    assert dataset.notes() == [f"data.root={root}: captions are the field {field} of {name}{said}"]


def test_quotes_in_a_tsv_are_ordinary_characters(root: Path) -> None:
    texts = ('"喵"地叫的猫', '"红猫说：', '叫了一声"')
    rows = "".join(f"{name}\t{text}\n" for name, text in zip(NAMES, texts, strict=True))
    listing(root, "metadata.tsv", f"file_name\ttext\n{rows}")
    assert [text for _, text in found(data(root))] == list(texts)
    listing(root, "metadata.tsv", 'file_name\ttext\n红猫.png\t"""喵""地叫"\n蓝狗.png\t"狗"\n绿鸟.png\t"\n')
    assert [text for _, text in found(data(root))] == ['"喵"地叫', "狗", '"']


def test_a_long_field_of_a_table(root: Path) -> None:
    listing(root, "metadata.csv", CSV.replace(TEXTS[1], "狗" * 140_000))
    assert [len(text) for _, text in found(data(root))] == [9, 140_000, 6]


def test_bad_rows_are_skipped_samples(root: Path) -> None:
    content = f"file_name,text\n{NAMES[0]},猫,坐着\n{NAMES[1]}\n{NAMES[2]},鸟\n,鱼\n"
    listing(root, "metadata.csv", content)
    dataset = data(root)
    where = f"{root}/metadata.csv"
    advice = 'the header has 2; put "…" around a caption that holds the separator'
    assert [dataset[index] for index in (0, 1, 3)] == [
        Skipped(NAMES[0], f"{where}:2 has 3 columns, {advice}"),
        Skipped(NAMES[1], f"{where}:3 has 1 columns, {advice}"),
        Skipped(
            f"{where}:5", f"{where}:5 names no image; use file_name or image or path (fields here: file_name, text)"
        ),
    ]
    assert dataset.texts() == ["", "", "鸟", ""]
    assert [bad.key for bad in dataset.known_bad()] == [NAMES[0], NAMES[1], f"{where}:5"]


def test_missing_images_are_known_before_any_is_decoded(root: Path) -> None:
    listing(root, "metadata.csv", f"{CSV}gone.png,鱼\n{NAMES[0]}/x.png,鱼\n")
    assert list(data(root).known_bad()) == [Skipped(f, "file not found") for f in ("gone.png", f"{NAMES[0]}/x.png")]
    assert [bad.key for bad in data(root, text_fields=()).known_bad()] == ["gone.png", f"{NAMES[0]}/x.png"]


def test_a_damaged_byte_costs_one_sample(root: Path) -> None:
    (root / "metadata.csv").write_bytes(CSV.encode().replace("蓝色".encode(), b"\xff\xfe"))
    dataset = data(root)
    assert dataset.texts() == [TEXTS[0], "", TEXTS[2]]
    assert "the caption is not valid Unicode" in str(dataset[1])


# --- data.listing, data.image_field, data.caption_field


def test_a_list_of_ones_own(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing(root, "labels.csv", CSV.replace("file_name,text", "filepath,title"))
    fields = {"image_field": "filepath", "caption_field": "title"}
    assert found(data(root, listing="labels.csv", **fields)) == list(ROWS)
    assert found(data(None, listing=str(root / "labels.csv"), **fields)) == list(ROWS)
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (root / "labels.csv").rename(elsewhere / "labels.csv")
    monkeypatch.chdir(tmp_path)
    dataset = data(root, listing="lists/labels.csv", **fields)
    assert found(dataset) == list(ROWS)
    assert dataset.notes() == [f"data.root={root}: captions are the field title of ../lists/labels.csv"]
    with pytest.raises(UserError, match=r"^data\.listing=gone\.csv does not exist, nor \S+/gone\.csv; give a file"):
        data(root, listing="gone.csv")


# --- other layouts


def test_caption_files_of_kohya(root: Path) -> None:
    for name, text in ROWS:
        listing(root, name.replace("png", "caption"), text)
    dataset = data(root)
    assert found(dataset) == sorted(ROWS)
    assert dataset.notes() == [f"data.root={root}: captions are the .caption files beside the images"]


def test_captions_in_another_folder(tmp_path: Path) -> None:
    folder(tmp_path, ["images/s/a.png", "images/b.png"])
    (tmp_path / "texts" / "s").mkdir(parents=True)
    listing(tmp_path, "texts/s/a.txt", "甲")
    listing(tmp_path, "texts/b.txt", "乙")
    listing(tmp_path, "texts/c.txt", "丙")
    dataset = data(tmp_path)
    assert found(dataset) == [("images/b.png", "乙"), ("images/s/a.png", "甲")]
    assert dataset.notes() == [
        f"data.root={tmp_path}: captions are the text files in another folder",
        f"data.root={tmp_path}: 1 file is left out: 1 .txt (texts/c.txt)",
    ]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_the_training_folder_of_an_imagefolder(tmp_path: Path, prefix: str) -> None:
    folder(tmp_path, ["train/a.png", "test/a.png"])
    for split in ("train", "test"):
        name = f"{prefix}a.png" if split == "train" else "a.png"
        listing(tmp_path / split, "metadata.jsonl", json.dumps({"file_name": name, "text": split}))
    dataset = data(tmp_path)
    assert found(dataset) == [("train/a.png", "train")]
    assert dataset.notes()[1].endswith("1 .png that no list names (test/a.png), 1 .jsonl (test/metadata.jsonl)")


def coco(annotations: list[dict[str, Any]]) -> str:
    images = [{"id": number, "file_name": f"00{number}.png"} for number in (1, 2, 3)]
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


def test_coco_annotations(tmp_path: Path) -> None:
    folder(tmp_path, [f"train2017/00{number}.png" for number in (1, 2, 3)])
    (tmp_path / "annotations").mkdir()
    annotations = [{"image_id": number, "id": 9, "caption": text} for number, text in ((2, "狗"), (1, "猫"), (2, "犬"))]
    listing(tmp_path, "annotations/captions_train2017.json", coco(annotations))
    listing(tmp_path, "annotations/captions_val2017.json", coco([]))
    dataset = data(tmp_path, captions="all")
    assert [dataset.key(index) for index in range(4)] == [f"train2017/00{number}.png" for number in (1, 2, 2, 3)]
    assert dataset.texts() == ["猫", "狗", "犬", ""]
    assert dataset[3] == Skipped("train2017/003.png", "the caption is empty")
    listing(tmp_path, "annotations/captions_train2017.json", coco([{"image_id": 1, "bbox": [1]}]))
    with pytest.raises(UserError, match=r"its annotations have no captions; give the file with captions, captions_"):
        data(tmp_path)


def test_the_files_of_chinese_clip(tmp_path: Path) -> None:
    rows = [(number, base64.urlsafe_b64encode(image(10 * number)).decode()) for number in range(1, 4)]
    listing(tmp_path, "train_imgs.tsv", "".join(f"{key}\t{data}\n" for key, data in [*rows, (4, "no base64!")]))
    texts = [{"text_id": 7, "text": "两张", "image_ids": [1, 2]}, {"text": "第三", "image_ids": [3]}]
    texts += [{"text": "又一", "image_ids": [1]}, {"text": "四", "image_ids": [4]}]
    listing(tmp_path, "train_texts.jsonl", "\n".join(map(json.dumps, texts)))
    dataset = data(tmp_path, captions="all")
    samples = [dataset[index] for index in range(len(dataset))]
    assert [(sample.key, sample.text, int(sample.image[0, 0, 0])) for sample in samples[:4]] == [  # type: ignore
        ("1", "两张", 10), ("1", "又一", 10), ("2", "两张", 20), ("3", "第三", 30)
    ]  # fmt: skip
    assert samples[4] == Skipped("4", "is not an image in base64")
    assert len(data(tmp_path, text_fields=())) == 4
    assert dataset.notes()[0].endswith("images of train_imgs.tsv, captions of train_texts.jsonl")


# --- messages


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"labels.csv": CSV.replace("file_name,text", "filepath,title")},
            "found 3 .png, and labels.csv with the columns filepath, title; set data.listing=labels.csv "
            "data.image_field=filepath data.caption_field=title",
        ),
        (
            {"captions.csv": CSV.replace("file_name,text", "图片,描述")},
            "captions.csv:2 names no image; use file_name or image or path (fields here: 图片, 描述); found 3 .png: "
            "set data.image_field=图片 data.caption_field=描述",
        ),
        (
            {"metadata.csv": CSV.replace("file_name,text", "image,prompt")},
            "metadata.csv:2 has no field text or caption; set data.caption_field to one of: image, prompt; found 3 "
            ".png: set data.caption_field=prompt",
        ),
        (
            {"metadata.jsonl": '{"url": "https://example.com/a.jpg", "caption": "猫"}'},
            "fields here: url, caption); url holds addresses: download the images, and name their files",
        ),
        ({"metadata.csv": "a.png,猫,x\n"}, "metadata.csv:1 names an image, so that the file has no header, and has 3"),
        ({"labels.xlsx": ""}, "found 3 .png, and labels.xlsx, a spreadsheet; save it as metadata.csv (CSV UTF-8)"),
        ({"README.md": ""}, "or one .txt per image (found 3 .png; task=vqvae needs no captions)"),
        (
            {"a/captions_x.json": "[]", "a/captions_y.json": "[]"},
            "several lists: a/captions_x.json, a/captions_y.json; ",
        ),
    ],
)
def test_what_to_do_with_a_folder_of_images(root: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        listing(root, name, content)
    with pytest.raises(UserError) as error:
        data(root)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.tar", "holds no images but 1 .tar; set data=webdataset data.urls='{root}/**/*.tar'"),
        ("0.parquet", "holds no images but 1 .parquet; set data=parquet data.urls='{root}/**/*.parquet'"),
        ("0.zip", "holds no images but 1 .zip; unpack it"),
        ("0.psd", "has no captions and no images, but 1 .psd; set it to a folder of images with captions"),
    ],
)
def test_what_to_do_with_a_folder_without_images(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        data(tmp_path)
    assert str(error.value) == f"data.root={tmp_path} {message.format(root=tmp_path)}"
    with pytest.raises(UserError, match="holds no images but 1"):
        data(tmp_path, text_fields=())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.tar", "is not a folder; set data=webdataset data.urls="),
        ("0.csv", "is not a folder; give the list as data.listing="),
        ("0.zip", "is not a folder; unpack it"),
    ],
)
def test_what_to_do_with_a_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        data(tmp_path / name)
    assert message in str(error.value)


def test_a_json_file_of_any_size_is_refused_in_one_line(root: Path) -> None:
    holes(root, "metadata.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl:1 has more than 1,048,576 characters"):
        data(root)
    with pytest.raises(UserError, match=r"big\.json has 1,099,511,627,776 bytes, at most 1,073,741,824 are "):
        data(root, listing=holes(root, "big.json") / "big.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", {"images": [1, {"id": [2]}, {"id": 1}], "annotations": [{"image_id": {}}, 4]}),
        ("captions.json", [1]), ("captions.json", {"a": 1}), ("captions.json", {"a.png": {"b": 1}}),
        ("captions.json", [{"path": "file://[", "text": "t"}]),
        ("captions.json", [{"path": "\ud800.png", "text": "t"}]),
        ("train_texts.jsonl", {"text": "t", "image_ids": 5}), ("train_texts.jsonl", {"text": 1, "image_ids": ["1"]}),
        ("train_texts.jsonl", []),
    ],
)  # fmt: skip
def test_any_json_is_a_result_or_one_line(tmp_path: Path, name: str, content: object) -> None:
    listing(tmp_path, name, json.dumps(content))
    if name.startswith("train"):
        listing(tmp_path, "train_imgs.tsv", "1\taGFsbG8=\n")
    else:
        folder(tmp_path, ["a.png"])
    try:
        dataset = data(tmp_path)
        assert all(isinstance(dataset[index], (ImageSample, Skipped)) for index in range(len(dataset)))
    except UserError as error:
        assert str(error) and "\n" not in str(error)
