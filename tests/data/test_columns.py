"""Parquet files and data sets of Hugging Face: columns, rows in any order, splits, and what is said about bad ones."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cogview_pl.data
from cogview_pl.assembly.image_data import open_images
from cogview_pl.data.config import HuggingFaceConfig, ParquetConfig
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.errors import UserError

from .shards import image, level

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

from cogview_pl.data.hf import HuggingFaceDataset  # noqa: E402
from cogview_pl.data.parquet import ParquetDataset  # noqa: E402


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(start: int, stop: int) -> dict[str, list[object]]:
    """Grey levels count the rows."""
    return {
        "image": [{"bytes": image(i), "path": f"{i}.png"} for i in range(start, stop)],
        "text": [f"图{i}" for i in range(start, stop)],
        "style": ["油画"] * (stop - start),
    }


def write(file: Path, table: dict[str, list[object]], group: int = 3) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file, row_group_size=group)
    return file


def parquet(urls: str | Path, split: str = "train", **options: object) -> ParquetDataset:
    return ParquetDataset(str(urls), split, 8, options.pop("val_fraction", 0.0), **options)  # type: ignore[arg-type]


def hf(name: str | Path, split: str = "train", **options: object) -> HuggingFaceDataset:
    return HuggingFaceDataset(str(name), split, 8, options.pop("val_fraction", 0.0), **options)  # type: ignore[arg-type]


def found(dataset: CaptionedImages) -> list[tuple[str, str, int]]:
    samples = [dataset[i] for i in range(len(dataset))]
    assert all(isinstance(sample, ImageSample) for sample in samples), samples
    return [(s.key, s.text, level(s)) for s in samples if isinstance(s, ImageSample)]


def parquet_of(tmp_path: Path, table: dict[str, list[object]], **options: object) -> CaptionedImages:
    return parquet(write(tmp_path / "train-0.parquet", table), **options)


def hf_of(tmp_path: Path, table: dict[str, list[object]], **options: object) -> CaptionedImages:
    return hf(write(tmp_path / "set" / "train-0.parquet", table).parent, **options)


BOTH = pytest.mark.parametrize("read", [parquet_of, hf_of], ids=["parquet", "hf"])
Read = Callable[..., CaptionedImages]


def test_rows_of_parquet_files_in_any_order(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"train-{number}.parquet", rows(10 * number, 10 * number + 10))
    dataset = parquet(f"{tmp_path}/train-{{0..2}}.parquet")
    assert found(dataset) == [(f"train-{i // 10}.parquet:{i % 10}", f"图{i}", i) for i in range(30)]
    copy = pickle.loads(pickle.dumps(dataset))  # as a worker has it
    for index in (29, 0, 17, 9, 10):
        sample = copy[index]
        assert isinstance(sample, ImageSample) and sample.text == dataset.text(index) == f"图{index}"
        assert torch.equal(sample.image, torch.full((3, 8, 8), index, dtype=torch.uint8))
    assert dataset.notes() == ["data.urls: images are the column image, captions the column text"]


def test_files_of_one_name_in_two_folders_have_different_keys(tmp_path: Path) -> None:
    for number, folder in enumerate("ab"):
        write(tmp_path / folder / "0.parquet", rows(number, number + 1))
    assert found(parquet(f"{tmp_path}/*/0.parquet")) == [("a/0.parquet:0", "图0", 0), ("b/0.parquet:0", "图1", 1)]


@BOTH
def test_images_are_bytes_or_paths(tmp_path: Path, read: Read) -> None:
    assert found(read(tmp_path / "1", {"picture": [image(5)], "caption": ["t"]}))[0][1:] == ("t", 5)
    folder = tmp_path / "2" / ("set" if read is hf_of else "")
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(image(7))
    assert found(read(tmp_path / "2", {"file_name": ["a.png"], "text": ["t"]}))[0][1:] == ("t", 7)
    struct: list[object] = [{"bytes": None, "path": str(folder / "a.png")}, {"bytes": image(9), "path": None}]
    assert [one[2] for one in found(read(tmp_path / "3", {"image": struct, "text": ["t", "u"]}))] == [7, 9]


@BOTH
def test_bad_rows_are_skipped_with_a_reason(tmp_path: Path, read: Read) -> None:
    table: dict[str, list[object]] = {
        "image": [image(1), None, b"", image(4), image(5), image(6)],
        "text": ["好", "t", "t", None, " ", "六"],
    }
    dataset = read(tmp_path, table)
    samples = [dataset[i] for i in range(6)]
    assert [s.reason if isinstance(s, Skipped) else s.text for s in samples] == [
        "好",
        "the image is empty",
        "not an image in a known format, or cut off",
        "the caption is empty",
        "the caption is empty",
        "六",
    ]
    assert {s.key.rpartition(":")[2] for s in dataset.known_bad()} >= {"3", "4"}
    addresses = read(tmp_path / "more", {"path": ["https://example.org/a.png"], "text": ["t"]})
    sample = addresses[0]
    assert isinstance(sample, Skipped)
    assert sample.reason == "https://example.org/a.png is an address, not a file; download the images first"


@BOTH
def test_columns_are_chosen_by_name(tmp_path: Path, read: Read) -> None:
    table = {"a": [image(1)], "b": [image(2)], "zh": ["红猫"], "n": [3], "many": [["一", "二"]]}
    sample = read(tmp_path, table, image_field="b", caption_field="zh")[0]
    assert isinstance(sample, ImageSample) and (sample.text, level(sample)) == ("红猫", 2)
    assert read(tmp_path, table, image_field="a", caption_field="many").text(0) == "一"
    two = read(tmp_path, table, image_field="a", caption_field="zh", text_fields=("text", "many"))[0]
    assert isinstance(two, ImageSample) and (two.text, two.fields) == ("红猫", {"many": "一"})
    alone = read(tmp_path, table, image_field="a", text_fields=())[0]
    assert isinstance(alone, ImageSample) and alone.text == ""
    for options, message in (
        ({"caption_field": "zh"}, r"^data\.image_field: \S+ has images in a, b; set it to one of them$"),
        ({"image_field": "c"}, r"^data\.image_field=c: no such column in \S+; it has a, b, zh, n, many$"),
        ({"image_field": "a"}, r"^data\.caption_field: no column text or caption in \S+; set it to one of: zh, many$"),
        ({"image_field": "a", "caption_field": "en"}, r"^data\.caption_field=en: no such column in \S+; set it to"),
        (
            {"image_field": "a", "caption_field": "zh", "style_patterns": ["{text}{style}"]},
            r"^data\.style_patterns is given without data\.style_field",
        ),
        (
            {"image_field": "a", "caption_field": "zh", "style_field": "x"},
            r"^data\.style_field=x: no such column in \S+; it has a, b",
        ),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path, table, **options)
    with pytest.raises(UserError, match=r"^data\.image_field: no column of \S+ holds images; it has text$"):
        read(tmp_path / "none", {"text": ["t"]})


@BOTH
def test_several_captions_of_a_row(tmp_path: Path, read: Read) -> None:
    table: dict[str, list[object]] = {
        "image": [image(i) for i in range(4)],
        "text": [["甲", "乙"], [None, "丙"], [], ["丁"]],
    }
    assert [read(tmp_path, table).text(i) for i in range(4)] == ["甲", "丙", "", "丁"]
    each = read(tmp_path, table, captions="all")
    samples = [each[i] for i in range(len(each))]
    assert [(s.text, level(s)) if isinstance(s, ImageSample) else s.reason for s in samples] == [
        ("甲", 0),
        ("乙", 0),
        ("丙", 1),
        "the caption is empty",
        ("丁", 3),
    ]
    drawn = {read(tmp_path, table, captions="random", caption_seed=seed).text(0) for seed in range(8)}
    assert drawn == {"甲", "乙"}


@BOTH
def test_styles_splits_and_fingerprints(tmp_path: Path, read: Read) -> None:
    table = rows(0, 40)
    with_style = read(tmp_path, table, style_field="style", style_patterns=["{text}的{style}图像"])
    assert with_style.text(3) == "图3的油画图像"
    train, val = (read(tmp_path, table, split=split, val_fraction=0.25) for split in ("train", "val"))
    assert sorted(found(train) + found(val)) == sorted(found(read(tmp_path, table)))
    assert 0 < len(val) < len(train)
    assert train.fingerprint() != val.fingerprint() != read(tmp_path, rows(0, 41)).fingerprint()


def test_the_fingerprint_is_that_of_settings_and_files(tmp_path: Path) -> None:
    for read, place in (
        (parquet, write(tmp_path / "a.parquet", rows(0, 4))),
        (hf, write(tmp_path / "set" / "0.parquet", rows(0, 4)).parent),
    ):
        one = read(place).fingerprint()
        assert read(place).fingerprint() == one
        assert read(place, min_size=4).fingerprint() != one
        write(place if place.is_file() else place / "0.parquet", rows(1, 5))
        assert read(place).fingerprint() != one
        assert found(read(place))[0][1] == "图1"  # no old copy is read


def test_validation_files_and_splits(tmp_path: Path) -> None:
    for name, start in (("train", 0), ("validation", 10)):
        write(tmp_path / "set" / f"{name}-00000-of-00001.parquet", rows(start, start + 4))
    files = {"urls": f"{tmp_path}/set/train-*.parquet", "val_urls": f"{tmp_path}/set/validation-*.parquet"}
    assert [one[2] for one in found(parquet(split="val", **files))] == [10, 11, 12, 13]
    assert [one[2] for one in found(parquet(**files))] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"^data\.val_urls: \S+ is in data\.urls too"):
        parquet(files["urls"], val_urls=files["urls"])
    val = hf(tmp_path / "set", "val", val_split="validation")
    assert [one[:2] for one in found(val)] == [(f"validation:{i}", f"图{10 + i}") for i in range(4)]
    assert len(hf(tmp_path / "set", val_split="validation")) == 4
    with pytest.raises(UserError, match=r"^data\.val_split=test: \S+ has no such split; set it to one of: train, vali"):
        hf(tmp_path / "set", "val", val_split="test")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows(0, 3))
    dataset = parquet(file)
    whole = file.read_bytes()
    for data in (whole[:-20], b"hello", b""):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.parquet is no whole Parquet file; fetch it again, or leave it out of"):
            parquet(file)
    file.unlink()
    assert dataset[0] == Skipped("a.parquet:0", f"{file} does not exist")
    with pytest.raises(UserError, match=r"^data\.urls=\S+ no file matches \S+; it is a folder, write \S+/\*\.parquet$"):
        parquet(tmp_path)
    with pytest.raises(UserError, match=r"no rows in \S+ … \(1 files in all\)"):
        parquet(write(file, {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}))  # type: ignore[dict-item]


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"cogview_pl.data.{kind}")
    monkeypatch.delattr(cogview_pl.data, kind)
    options = {"parquet": ParquetConfig(urls="*"), "hf": HuggingFaceConfig(name="set")}[kind]
    options._target_ = {
        "parquet": "cogview_pl.data.parquet.ParquetDataset",
        "hf": "cogview_pl.data.hf.HuggingFaceDataset",
    }[kind]
    with pytest.raises(UserError, match=rf'^data={kind} needs {package}; pip install "cogview_pl\[hf\]"$'):
        open_images(options, "train")


# --- folders that `datasets` knows


def test_a_folder_that_save_to_disk_wrote(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": [image(i) for i in range(3)], "text": ["甲", "乙", "丙"]})
    made = made.cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(str(tmp_path / "two"))
    assert found(hf(tmp_path / "one")) == [("train:0", "甲", 0), ("train:1", "乙", 1), ("train:2", "丙", 2)]
    assert found(hf(tmp_path / "two", train_split="test")) == [("test:0", "丙", 2)]
    copy = pickle.loads(pickle.dumps(hf(tmp_path / "two")))
    assert copy[1].text == "乙"
    assert hf(tmp_path / "one").notes() == [
        f"data.name={tmp_path}/one: images are the column image, captions the column text"
    ]


def test_a_folder_of_images_with_metadata(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("test", 4)):
        (tmp_path / "set" / split).mkdir(parents=True)
        (tmp_path / "set" / split / "a.png").write_bytes(image(number))
        line = json.dumps({"file_name": "a.png", "text": f"{split}的猫"}, ensure_ascii=False)
        (tmp_path / "set" / split / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert found(hf(tmp_path / "set")) == [("train:0", "train的猫", 3)]
    assert found(hf(tmp_path / "set", "val", val_split="test")) == [("test:0", "test的猫", 4)]


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^data\.name=/no/where does not exist; give a folder, or the name"):
        hf("/no/where")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"^data\.name=\S+empty cannot be loaded: .*; give a folder of Parquet"
    ) as error:
        hf(tmp_path / "empty")
    assert "\n" not in str(error.value)


def test_a_script_in_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "set" / "0.parquet", rows(0, 2)).parent
    (folder / "README.md").write_text("# set")
    (folder / "other.py").write_text(script := f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert len(hf(folder)) == 2
    (folder / "set.py").write_text(script)
    with pytest.raises(UserError, match=r"cannot be loaded: Dataset scripts are no longer supported"):
        hf(folder)
    assert not (tmp_path / "ran").exists()
