"""Data sets as people have them, through the command line: shards whose bad samples come first."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data.shards import write_tar

SIZES = ("data.batch_size=8", "threads=1", "plan.strict=false")
TRAINING = ("trainer.max_steps=2", "image_tokenizer.quantize_after_steps=1", "image_tokenizer.quantizer.kmeans_iters=1")


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (number % 256, 80, 160)).save(stream, "PNG")
    return stream.getvalue()


def write_table(file: Path) -> None:
    """Rows of which two cannot be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir()
    images = [{"bytes": b"" if number == 1 else png(number), "path": None} for number in range(40)]
    texts = [None if number == 0 else f"第{number}张红色的图像" for number in range(40)]
    pq.write_table(pa.table({"image": images, "caption": texts}), file, row_group_size=7)


def samples(count: int, bad: int) -> dict[str, bytes]:
    """Samples with a dot in their names; the first ones lack their image, their caption, or are damaged."""
    members = {}
    for number in range(count):
        key, kind = f"scan.{number:03d}", number % 3 if number < bad else None
        caption = None if kind == 0 else f"第{number}张红色的图像"
        members[f"{key}.json"] = json.dumps({"caption": caption}).encode()
        if kind != 1:
            members[f"{key}.png"] = b"" if kind == 2 else png(number)
    return members


def write_folder(root: Path) -> None:
    """Forty images, listed as Chinese Excel writes it, with one missing image, one short row and one file too many."""
    (root / "s").mkdir(parents=True)
    for number in range(40):
        (root / "s" / f"{number:02d}.PNG").write_bytes(png(number))
    rows = [f"s\\{number:02d}.png;第{number}张红色的图像" for number in range(39)]
    text = "\r\n".join(["图片;描述", *rows, "gone.png;没有", "short.png", ";", ""])
    (root / "labels.csv").write_bytes(text.encode("gbk"))


@pytest.fixture(scope="module")
def ended(cli, tmp_path_factory):
    home = tmp_path_factory.mktemp("shards")
    write_tar(home / "good.tar", samples(180, bad=15))
    write_tar(home / "hopeless.tar", samples(180, bad=90))
    write_folder(home / "folder")
    data = ("data=webdataset", *SIZES)
    tokens = ("task=tokenize", *data, "image_tokenizer.path=images", "text.vocab_size=290")
    cases = {
        "vqvae": ["task=vqvae", *data, *TRAINING, "data.urls=good.tar", "run_dir=images"],
        "tokenize": [*tokens, "data.urls=good.tar", "run_dir=tokens"],
        "folder": [
            *("task=tokenize", "data=folder", "data.root=folder", "data.listing=labels.csv", *SIZES),
            *("data.image_field=图片", "data.captions=all", "data.caption_field=描述"),
            *("image_tokenizer.path=images", "text.vocab_size=300", "run_dir=folder_tokens"),
        ],
        "hopeless": [*tokens, "data.urls=hopeless.tar", "run_dir=none"],
    }
    if importlib.util.find_spec("datasets") is not None:
        write_table(home / "table" / "train.parquet")
        images = ("image_tokenizer.path=images", "text.vocab_size=290", "data.num_workers=1", *SIZES)
        for name, data in (("parquet", "data.urls=table/*.parquet"), ("hf", "data.name=table")):
            cases[name] = ["task=tokenize", f"data={name}", data, *images, f"run_dir={name}"]
    results = cli.run_many([(args, home) for args in cases.values()], home)
    return home, dict(zip(cases, results, strict=True))


def listed(run: Path) -> dict[str, str]:
    lines = (run / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["key"]: record["reason"] for record in map(json.loads, lines)}


def test_bad_samples_that_come_first_are_skipped_with_their_reasons(ended) -> None:
    home, results = ended
    assert results["tokenize"].code == 0, results["tokenize"].stderr[-3000:]
    reasons = ("the caption is empty", "no image in the shard", "not an image in a known format, or cut off")
    assert listed(home / "tokens") == {f"scan.{number:03d}": reasons[number % 3] for number in range(15)}
    metrics = json.loads((home / "tokens" / "metrics.json").read_text())
    assert metrics["tokenize/rows_train"] + metrics["tokenize/rows_val"] == 165
    assert metrics["tokenize/skipped"] == 15


def test_a_folder_with_a_list_from_excel_becomes_tokens(ended) -> None:
    home, results = ended
    said = results["folder"].stdout
    assert results["folder"].code == 0, results["folder"].stderr[-3000:]
    assert said.count("captions are the field 描述 of labels.csv (GB18030, separator ;)") == 1
    assert said.count("1 file is left out: 1 .png that no list names (s/39.PNG)") == 1
    metrics = json.loads((home / "folder_tokens" / "metrics.json").read_text())
    assert metrics["tokenize/rows_train"] + metrics["tokenize/rows_val"] == 39
    reasons = listed(home / "folder_tokens")
    assert reasons.keys() == {"gone.png", "short.png"} and reasons["gone.png"] == "file not found"
    assert reasons["short.png"].startswith("folder/labels.csv:42 has 1 columns, the header has 2; ")


def test_stage_one_lists_what_it_knows_before_it_reads(ended) -> None:
    home, results = ended
    assert results["vqvae"].code == 0, results["vqvae"].stderr[-3000:]
    assert "data.urls: 180 names have dots, such as scan.000;" in results["vqvae"].stdout
    assert {f"scan.{number:03d}" for number in range(15) if number % 3 == 1} <= listed(home / "images").keys()


def test_a_share_that_is_too_large_ends_the_run_and_all_that_is_known_is_listed(ended) -> None:
    home, results = ended
    assert results["hopeless"].code == 2
    assert results["hopeless"].stderr.startswith("cogview_pl: 60 of the 180 samples cannot be used (first: scan.0")
    assert listed(home / "none").keys() == {f"scan.{number:03d}" for number in range(90) if number % 3 != 2}


@pytest.mark.parametrize("name", ["parquet", "hf"])
def test_tables_become_tokens(ended, name: str) -> None:
    pytest.importorskip("datasets")
    home, results = ended
    assert results[name].code == 0, results[name].stderr[-3000:]
    metrics = json.loads((home / name / "metrics.json").read_text())
    assert metrics["tokenize/rows_train"] + metrics["tokenize/rows_val"] == 38
    assert [key.rpartition(":")[2] for key in listed(home / name)] == ["0", "1"]
    assert "images are the column image, captions the column caption" in results[name].stdout
