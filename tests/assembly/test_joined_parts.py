"""The lists of bad samples of all parts are one list, and are judged together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cogview_pl.assembly.joined_parts import TOKEN_STORE, Lists, join_parts
from cogview_pl.data.bad_samples import BadSampleLog
from cogview_pl.data.mended import MendedLog
from cogview_pl.data.samples import Skipped
from cogview_pl.data.token_store.parts import part_of
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError

SAMPLES = {"train": 8}
BAD = {1: ["a", "b"], 2: ["b", "c"]}
"""Keys of bad samples by part; each part found b, which has no caption, before it read images."""


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    folders = []
    for number, bad in BAD.items():
        part, spans = part_of(number, 2, SAMPLES, 2, {})
        folder = tmp_path / str(number)
        writer = TokenStoreWriter(
            folder / TOKEN_STORE,
            text_length=4,
            grid=(1, 1),
            text_vocab_size=9,
            codebook_size=9,
            text_tokenizer="text",
            image_tokenizer="images",
            splits={name: len(span) for name, span in spans.items()},
            part=part,
        )
        writer.append("train", {"text": [[number]]}, torch.zeros(1, 1, 1, dtype=torch.int64), [f"{number}"], 4)
        writer.finish()
        BadSampleLog(folder / "skipped.jsonl", 1.0).note(Skipped(key, f"bad {key}") for key in bad)
        MendedLog(folder / "mended.jsonl").add({f"m{number}": "cut off"})
        folders.append(folder)
    return folders


def test_the_lists_of_the_parts_follow_each_other(parts: list[Path], tmp_path: Path) -> None:
    joined = tmp_path / "joined"
    joined.mkdir()
    lists = Lists.of(joined, 0.5)
    header = join_parts(parts[::-1], joined, lists)
    lines = [json.loads(line) for line in (joined / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [(key, f"bad {key}") for key in "abc"]
    assert (joined / "mended.jsonl").read_bytes() == b"".join((part / "mended.jsonl").read_bytes() for part in parts)
    assert lists.counts(header) == {
        "tokenize/rows_train": 2,
        "tokenize/captions_cut": 0,
        "tokenize/skipped": 3,
        "tokenize/mended": 2,
        "tokenize/text_vocab_size": 9,
    }


def test_too_many_bad_samples_in_all_parts_are_refused(parts: list[Path], tmp_path: Path) -> None:
    joined = tmp_path / "joined"
    joined.mkdir()
    with pytest.raises(UserError, match=r"3 of the 8 samples cannot be used \(first: a: bad a\)"):
        join_parts(parts, joined, Lists.of(joined, 2 / 8))
    assert not (joined / TOKEN_STORE).exists()


def test_a_damaged_list_is_named(parts: list[Path], tmp_path: Path) -> None:
    (parts[1] / "skipped.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(UserError, match=r"2/skipped\.jsonl:1 is damaged or no skipped sample"):
        join_parts(parts, tmp_path, Lists.of(tmp_path, 1.0))
