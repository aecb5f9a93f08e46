"""The tables of docs/data.md: each row is tried, by a test that is named by the row's first cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cogview_pl.data.bad_samples import BadSampleLog, require_readable
from cogview_pl.data.samples import CaptionedImages, ImageSample, Skipped
from cogview_pl.errors import UserError

from .documented_pictures import Pictures
from .shards import image, level, read, write_tar

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
Case = Callable[[Path], None]


def rows(heading: str) -> list[str]:
    """First cells of the tables in a section."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    header = {
        line for line, below in zip(section.splitlines(), section.splitlines()[1:], strict=False) if "|---" in below
    }
    return [line.split(" | ")[0].removeprefix("| ") for line in lines if line not in header]


def cases_of(holder: type) -> dict[str, Case]:
    """The cases of a class, by the first line of their docstrings."""
    found = vars(holder).items()
    return {str(case.__func__.__doc__): case.__func__ for name, case in found if name.startswith("row_")}


def found(dataset: CaptionedImages) -> list[tuple[str, str, int]]:
    """Key, caption and grey level of the usable samples."""
    samples = [dataset[i] for i in range(len(dataset))]
    return [(s.key, s.text, level(s)) for s in samples if isinstance(s, ImageSample)]


def skipped(dataset: CaptionedImages) -> dict[str, str]:
    samples = [dataset[i] for i in range(len(dataset))]
    return {s.key: s.reason for s in samples if isinstance(s, Skipped)}


class Shards:
    @staticmethod
    def row_sample(home: Path) -> None:
        """`KEY.jpg`, `KEY.json` or `KEY.txt`"""
        members = {"IMG1.png": image(1), "IMG1.json": json.dumps({"caption": "红猫"}).encode(), "IMG1.txt": b"cat"}
        tar = write_tar(home / "0.tar", members)
        assert found(read(tar, "caption")) == [("IMG1", "红猫", 1)]
        assert found(read(tar, "txt")) == [("IMG1", "cat", 1)]

    @staticmethod
    def row_dots(home: Path) -> None:
        """names with dots of their own"""
        members = {f"scan.{i:03d}.{e}": image(i) if e == "png" else b"%d" % i for i in range(3) for e in ("png", "txt")}
        assert found(read(write_tar(home / "0.tar", members), "txt")) == [
            (f"scan.{i:03d}", f"{i}", i) for i in range(3)
        ]

    @staticmethod
    def row_further_images(home: Path) -> None:
        """`KEY.small.jpg` next to `KEY.jpg` and `KEY.txt`"""
        dataset = read(write_tar(home / "0.tar", {"a.png": image(1), "a.txt": b"t", "a.small.png": image(2)}), "txt")
        assert found(dataset) == [("a", "t", 1)]
        assert "1 member is left out: 1 further image of a sample (a.small.png)" in dataset.notes()[1]

    @staticmethod
    def row_other_name(home: Path) -> None:
        """`KEY.input.jpg` next to `KEY.txt`"""
        members = {"a.input.png": image(1), "a.txt": b"t"}
        members |= {"b.left.png": image(2), "b.right.png": image(3), "b.txt": b"u"}
        dataset = read(write_tar(home / "0.tar", members), "txt")
        assert found(dataset) == [("a", "t", 1)]
        assert "several images" in skipped(dataset)["b"]

    @staticmethod
    def row_joined(home: Path) -> None:
        """joined tar files"""
        tars = [write_tar(home / f"{i}.tar", {f"{i}.png": image(i), f"{i}.txt": b"t"}).read_bytes() for i in range(2)]
        (home / "both.tar").write_bytes(b"".join(tars))
        assert found(read(home / "both.tar", "txt")) == [("0", "t", 0), ("1", "t", 1)]
        (home / "both.tar").write_bytes(tars[0] + b"other data")
        with pytest.raises(UserError, match=r"both\.tar is cut off or damaged at byte"):
            read(home / "both.tar", "txt")

    @staticmethod
    def row_name_twice(home: Path) -> None:
        """a name that appears twice in a shard"""
        tars = [write_tar(home / f"{i}.tar", {"a.png": image(i), "a.txt": b"t"}).read_bytes() for i in range(2)]
        (home / "both.tar").write_bytes(b"".join(tars))
        dataset = read(home / "both.tar", "txt")
        assert found(dataset) == [("a", "t", 1)]
        assert "2 earlier members of a name that appears twice" in dataset.notes()[1]

    @staticmethod
    def row_key_twice(home: Path) -> None:
        """a key in several shards"""
        for number in range(2):
            write_tar(home / f"{number}.tar", {"a.png": image(number), "a.txt": b"t"})
        dataset = read(f"{home}/*.tar", "txt")
        assert found(dataset) == [("a", "t", 0), ("a", "t", 1)]
        assert "1 sample has the key of an earlier one, such as a in" in dataset.notes()[1]

    @staticmethod
    def row_left_out(home: Path) -> None:
        """links, hidden files, files without extension, unused extensions"""
        members = {"a.png": image(1), "a.txt": b"t", "a.cls": b"1", "._a.png": b"mac", "README": b""}
        note = read(write_tar(home / "0.tar", members), "txt").notes()[1]
        assert "3 members are left out: " in note
        assert all(kind in note for kind in ("1 .cls (a.cls)", "1 hidden file (._a.png)", "1 without an extension"))


class BadSamples:
    @staticmethod
    def row_caption(home: Path) -> None:
        """missing, empty or broken caption"""
        texts = {"a": None, "b": b" ", "c": "红猫".encode("gbk"), "d": b"t"}
        members = {f"{key}.png": image(1) for key in texts}
        members |= {f"{key}.txt": text for key, text in texts.items() if text is not None}
        dataset = read(write_tar(home / "0.tar", members), "txt")
        reasons = {"a": "no .txt in the shard", "b": "the caption is empty", "c": "the .txt is not UTF-8 text"}
        assert skipped(dataset) == {sample.key: sample.reason for sample in dataset.known_bad()} == reasons

    @staticmethod
    def row_image(home: Path) -> None:
        """missing, empty or broken image"""
        members = {"a.txt": b"t", "b.png": b"", "b.txt": b"t", "c.png": image(1)[:30], "c.txt": b"t", "d.png": image(1)}
        dataset = read(write_tar(home / "0.tar", members | {"d.txt": b"t"}), "txt")
        assert skipped(dataset).keys() == {"a", "b", "c"}
        assert [sample.key for sample in dataset.known_bad()] == ["a"]

    @staticmethod
    def row_share(home: Path) -> None:
        """largest share"""
        log = BadSampleLog(home / "skipped.jsonl", max_share=0.1)
        log.note(Skipped(f"{number}", "r") for number in range(100))
        log.require_few(1000)
        with pytest.raises(UserError, match=r"100 of the 999 samples cannot be used"):
            log.require_few(999)

    @staticmethod
    def row_hopeless(home: Path) -> None:
        """hopeless sets"""
        log = BadSampleLog(home / "skipped.jsonl", max_share=0.1)
        with pytest.raises(UserError, match=r"of 100 samples, chosen at random, cannot be used"):
            log.require_few_in_probe([Skipped(f"{i}", "r") for i in range(1000)], lambda: None)  # type: ignore[arg-type]

    @staticmethod
    def row_training(home: Path) -> None:
        """training"""
        log = BadSampleLog(home / "skipped.jsonl", max_share=0.1)
        log.add([Skipped(f"{number}", "r") for number in range(11)], seen=99)
        with pytest.raises(UserError, match=r"11 of 100 samples cannot be used"):
            log.add([], seen=1)

    @staticmethod
    def row_nothing(home: Path) -> None:
        """nothing usable"""
        with pytest.raises(UserError, match=r"none of 64 samples of 70 can be used"):
            require_readable([Skipped(f"{number}", "r") for number in range(70)])  # type: ignore[arg-type]


def parquet_files(home: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, split in enumerate(("train", "validation")):
        rows = {"image": [{"bytes": image(number), "path": None}], "text": [f"{split}的猫"]}
        pq.write_table(pa.table(rows), home / f"{split}-00000-of-00001.parquet")
    return home


def hugging_face(name: Path, split: str = "train", **options: object) -> CaptionedImages:
    datasets = pytest.importorskip("datasets")
    from cogview_pl.data.hf import HuggingFaceDataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", name.parent / "cache")
        return HuggingFaceDataset(str(name), split, 8, 0.0, **options)  # type: ignore[arg-type]


def parquet(urls: str, split: str = "train", **options: object) -> CaptionedImages:
    pytest.importorskip("pyarrow")
    from cogview_pl.data.parquet import ParquetDataset

    return ParquetDataset(urls, split, 8, 0.0, **options)  # type: ignore[arg-type]


class Tables:
    @staticmethod
    def row_parquet(home: Path) -> None:
        """Parquet files"""
        dataset = parquet(f"{parquet_files(home)}/train-*.parquet")
        assert found(dataset) == [("train-00000-of-00001.parquet:0", "train的猫", 0)]

    @staticmethod
    def row_columns(home: Path) -> None:
        """other columns"""
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"picture": [image(3)], "zh": ["红猫"]}), home / "0.parquet")
        dataset = parquet(f"{home}/0.parquet", image_field="picture", caption_field="zh")
        assert found(dataset) == [("0.parquet:0", "红猫", 3)]

    @staticmethod
    def row_validation(home: Path) -> None:
        """validation files"""
        files = parquet_files(home)
        dataset = parquet(f"{files}/train-*.parquet", "val", val_urls=f"{files}/validation-*.parquet")
        assert found(dataset) == [("validation-00000-of-00001.parquet:0", "validation的猫", 1)]

    @staticmethod
    def row_saved(home: Path) -> None:
        """folder of `save_to_disk`"""
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"image": [image(4)], "text": ["红猫"]}).save_to_disk(str(home / "saved"))
        assert found(hugging_face(home / "saved")) == [("train:0", "红猫", 4)]

    @staticmethod
    def row_parquet_folder(home: Path) -> None:
        """folder of Parquet files"""
        (home / "set").mkdir()
        files = parquet_files(home / "set")
        assert found(hugging_face(files, val_split="validation")) == [("train:0", "train的猫", 0)]
        assert found(hugging_face(files, "val", val_split="validation")) == [("validation:0", "validation的猫", 1)]

    @staticmethod
    def row_image_folder(home: Path) -> None:
        """folder of images (`imagefolder`)"""
        for number, split in enumerate(("train", "test")):
            folder = home / "set" / split
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(image(number))
            (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": f"{split} cat"}) + "\n")
        assert found(hugging_face(home / "set", val_split="test")) == [("train:0", "train cat", 0)]

    @staticmethod
    def row_hub(home: Path) -> None:
        """name on the hub"""
        datasets = pytest.importorskip("datasets")
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(UserError, match=r"^data\.name=no-such/set cannot be"),
        ):
            patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            hugging_face(Path("no-such/set"))


SECTIONS = {
    "Colour and formats": Pictures,
    "Shards": Shards,
    "Bad samples": BadSamples,
    "Parquet and Hugging Face": Tables,
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_each_row_has_a_case_and_each_case_a_row(heading: str) -> None:
    assert sorted(cases_of(SECTIONS[heading])) == sorted(rows(heading))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for holder in SECTIONS.values() for name, case in cases_of(holder).items()]
)
def test_what_a_row_says(tmp_path: Path, case: Case) -> None:
    case(tmp_path)
