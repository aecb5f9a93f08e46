"""Two texts of a sample: from two columns of the data to two slots of a sequence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview_pl.data.folder import FolderDataset
from cogview_pl.data.samples import ImageSample, Skipped
from cogview_pl.data.sequence_dataset import SequenceDataset
from cogview_pl.data.token_store.header import TokenStoreHeader
from cogview_pl.data.token_store.rows import RowLayout, WithoutText
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.data.webdataset import ShardDataset
from cogview_pl.errors import UserError
from cogview_pl.vocab import Template, Vocabulary

from .image_folders import captioned, folder, listing
from .shards import image, write_tar

FIELDS = ("question", "answer")
LAYOUT = "[BASE] [BOI1] {image:1x2} [EOI1] [ROI1] {question} [SEP] {answer} [EOI2]"
IDENTITIES = {"text_tokenizer": "text-1", "image_tokenizer": "image-1"}
TEXTS = {"question": [[1, 2], [3], []], "answer": [[4], [5, 6, 7, 8], [9]]}
CODES = torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]]])


def write(folder: Path, fields: tuple[str, ...] = FIELDS) -> TokenStore:
    sizes = {"text_length": 3, "grid": (1, 2), "text_vocab_size": 10, "codebook_size": 6}
    writer = TokenStoreWriter(folder, **sizes, **IDENTITIES, splits={"train": 3}, text_fields=fields)  # type: ignore[arg-type]
    writer.append("train", {name: TEXTS[name] for name in fields}, CODES, ["a", "b", "c"], 3)
    writer.finish()
    return TokenStore.open(folder)


def template(layout: str = LAYOUT, target: str = "answer") -> Template:
    return Template(layout, target=target, loss={target: 1.0}, vocabulary=Vocabulary(6, 10), text_length=3)


def test_a_folder_reads_the_columns_of_the_slots(tmp_path: Path) -> None:
    captioned(tmp_path, ["a.png", "b.png"])
    listing(tmp_path, "captions.csv", "file_name,question,answer,text\na.png, 几个？ ,三个,图\nb.png,,两个,图\n")
    found = FolderDataset(tmp_path, "train", 4, 0.0, text_fields=FIELDS)
    sample = found[0]
    assert isinstance(sample, ImageSample)
    assert (sample.text, dict(sample.fields)) == ("", {"question": "几个？", "answer": "三个"})
    assert found[1] == Skipped("b.png", "the question is empty")
    assert [found.text(1, field) for field in FIELDS] == ["", "两个"]
    both = FolderDataset(tmp_path, "train", 4, 0.0, text_fields=("text", "answer"))[0]
    assert isinstance(both, ImageSample) and (both.text, dict(both.fields)) == ("图", {"answer": "三个"})
    assert found.fingerprint() != FolderDataset(tmp_path, "train", 4, 0.0).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_fields": ("title", "text")},
            r"csv:2 has no field title; set the slot in template\.layout or data.pair_field to one of: fi",
        ),
        (
            {"text_fields": FIELDS, "style_field": "text", "style_patterns": ["{text}{style}"]},
            r"^data\.style_patterns: they name the style in \{text\}, a slot that template\.layout lacks$",
        ),
    ],
)
def test_a_folder_that_lacks_a_text_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    captioned(tmp_path, ["a.png"])
    listing(tmp_path, "captions.csv", "file_name,question,answer,text\na.png,q,a,t\n")
    with pytest.raises(UserError, match=message):
        FolderDataset(tmp_path, "train", 4, 0.0, **options)  # type: ignore[arg-type]


def test_captions_in_text_files_have_no_columns(tmp_path: Path) -> None:
    folder(tmp_path, ["a.png"])
    listing(tmp_path, "a.txt", "图")
    with pytest.raises(
        UserError, match=r"captions in \.txt files, which have no columns question, answer; write a meta"
    ):
        FolderDataset(tmp_path, "train", 4, 0.0, text_fields=FIELDS)


def test_shards_read_the_keys_of_the_slots(tmp_path: Path) -> None:
    records = [{"question": "几个？", "answer": ["三个", "3"]}, {"question": 7, "answer": "a"}, {"answer": "a"}]
    members = {f"s{i}.json": json.dumps(record).encode() for i, record in enumerate(records)}
    shard = write_tar(tmp_path / "s.tar", members | {f"s{i}.png": image(i) for i in range(3)})
    found = ShardDataset(str(shard), "train", 4, 0.0, "caption", text_fields=FIELDS)
    samples = {sample.key: sample for sample in (found[i] for i in range(3))}
    first = samples["s0"]
    assert isinstance(first, ImageSample)
    assert (first.text, dict(first.fields)) == ("", {"question": "几个？", "answer": "三个"})
    assert samples["s1"] == Skipped("s1", "the question is not text but 7")
    assert samples["s2"] == Skipped("s2", "the question is empty")
    with pytest.raises(UserError, match=r"^template\.layout slot or data\.pair_field=title: no such field in the "):
        ShardDataset(str(shard), "train", 4, 0.0, "caption", text_fields=("title", "answer"))


def test_a_store_keeps_a_column_for_each_text(tmp_path: Path) -> None:
    store = write(tmp_path)
    rows = store.split("train")
    assert [rows[i][0] for i in range(3)] == [
        {"question": [1, 2], "answer": [4]},
        {"question": [3], "answer": [5, 6, 7]},
        {"question": [], "answer": [9]},
    ]
    assert all(torch.equal(rows[i][1], CODES[i]) for i in range(3))
    disk = np.fromfile(tmp_path / "train.bin", dtype="<u2").reshape(3, 8)
    none = 65535
    assert disk[1].tolist() == [3, none, none, 5, 6, 7, 2, 3]
    assert store.header.splits["train"].truncated == 1
    assert json.loads((tmp_path / "header.json").read_text())["text_fields"] == ["question", "answer"]
    assert TokenStoreHeader.load(tmp_path).text_fields == FIELDS
    empty = WithoutText(rows, keep="answer")
    assert empty[0][0] == {"question": [], "answer": [4]} and WithoutText(rows)[0][0] == {"question": [], "answer": []}
    with pytest.raises(UserError, match=r"text_fields \('question', 'answer'\), this run has \('text',\)"):
        TokenStoreWriter(tmp_path, **vars_of(store), splits={"train": 3})


def vars_of(store: TokenStore) -> dict[str, object]:
    names = ("text_length", "grid", "text_vocab_size", "codebook_size", "text_tokenizer", "image_tokenizer")
    return {name: getattr(store.header, name) for name in names}


def test_a_store_of_one_text_does_not_name_it(tmp_path: Path) -> None:
    TokenStoreWriter(tmp_path / "one", **vars_of(write(tmp_path / "two")), splits={"train": 3})
    assert "text_fields" not in json.loads((tmp_path / "one" / "header.json").read_text())
    assert TokenStoreHeader.load(tmp_path / "one").text_fields == ("text",)


@pytest.mark.parametrize("fields", [(), ("a", "a"), ("",), (3,)])
def test_names_of_texts_must_differ(fields: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="text_fields is"):
        RowLayout(text_length=3, grid=(1, 2), text_vocab_size=10, codebook_size=6, text_fields=fields)


def test_rows_of_the_original_hold_one_text() -> None:
    with pytest.raises(ValueError, match="format is cogview, whose rows hold one text"):
        RowLayout(text_length=3, grid=(1, 2), text_vocab_size=10, codebook_size=6, text_fields=FIELDS, format="cogview")


def test_each_slot_takes_the_text_of_its_name(tmp_path: Path) -> None:
    rows = write(tmp_path).split("train")
    built = template()
    data = SequenceDataset(rows, built, (1, 2), FIELDS)
    wanted = built.build({"image": [2, 3], "question": [3], "answer": [5, 6, 7]})
    for found, column in zip(data[1], wanted, strict=True):
        np.testing.assert_array_equal(found, column, strict=True)
    command, text = built.vocabulary.command, built.vocabulary.text_tokens.start
    words = [command(f"[{name}]") for name in ("BASE", "BOI1", "EOI1", "ROI1", "SEP", "EOI2")]
    question, answer = [text + 1, text + 2], [text + 4]
    assert data[0].tokens.tolist() == [*words[:2], 0, 1, *words[2:4], *question, words[4], *answer, words[5]]
    assert data[0].weights.tolist() == [0.0] * 9 + [1.0, 1.0]
    swapped = SequenceDataset(
        rows, template("[ROI1] {answer} [SEP] {question} [EOI1] {image:1x2}", "image"), (1, 2), FIELDS
    )
    assert swapped[0].tokens.tolist() == [words[3], *answer, words[4], *question, words[2], 0, 1]
    one = SequenceDataset(rows, template("[ROI1] {answer} [EOI1] {image:1x2}", "image"), (1, 2), FIELDS)
    assert one[0].tokens.tolist() == [words[3], *answer, words[2], 0, 1]


def test_a_slot_without_a_text_is_refused(tmp_path: Path) -> None:
    rows = write(tmp_path, ("question",)).split("train")
    with pytest.raises(UserError, match=r"no text for slot answer, only for question; run task=tokenize with this"):
        SequenceDataset(rows, template(), (1, 2), ("question",))
    alone = SequenceDataset(rows, template("[ROI1] {text} [EOI1] {image:1x2}", "image"), (1, 2), ("question",))
    assert alone[1].tokens[1] == alone.template.vocabulary.text_tokens.start + 3
