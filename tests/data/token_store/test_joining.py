"""Parts of a tokenisation: they cover the data set, and joined they are the store that one process writes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogview_pl.data.token_store.header import TokenStoreHeader, row_files
from cogview_pl.data.token_store.joining import join, open_parts
from cogview_pl.data.token_store.parts import part_of, span_of
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError

from .stores import SETTINGS, append, content, edit_header

SAMPLES: dict[str, int] = SETTINGS["splits"]
COUNT, BATCH = 4, 2


def make_part(folder: Path, number: int, *, count: int = COUNT, batch: int = BATCH, **changes: Any) -> Path:
    """What a run with `token_store.part` does, until the end."""
    inputs = changes.pop("inputs", {"data (train split)": "0123"})
    part, spans = part_of(number, count, SAMPLES, batch, inputs)
    splits = {name: len(span) for name, span in spans.items()}
    writer = TokenStoreWriter(folder, **{**SETTINGS, "splits": splits, **changes}, part=part)
    for name, span in spans.items():
        while (done := writer.resume_index(name)) < len(span):
            append(writer, name, done, min(done + batch, len(span)), first=span.start)
    writer.finish()
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [make_part(tmp_path / f"part{number}", number) for number in range(1, COUNT + 1)]


@pytest.mark.parametrize("samples", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("count", [1, 2, 5, 256])
def test_parts_cover_the_data_set_in_whole_batches(samples: int, batch: int, count: int) -> None:
    spans = [span_of(number, count, samples, batch) for number in range(1, count + 1)]
    assert [index for span in spans for index in span] == list(range(samples))
    assert all(span.start % batch == 0 or not span for span in spans)
    sizes = [-(-len(span) // batch) for span in spans]
    assert max(sizes) - min(sizes) <= 1


def test_joined_parts_are_the_store_of_one_process(store: Path, parts: list[Path], tmp_path: Path) -> None:
    header = join(open_parts([parts[i] for i in (2, 0, 3, 1)]), tmp_path / "joined")
    assert header == TokenStoreHeader.load(store)
    joined = content(tmp_path / "joined")
    for split in SAMPLES:
        pieces = [joined.pop(f"{split}.{number:04}-of-0004.bin") for number in range(1, COUNT + 1)]
        joined[f"{split}.bin"] = b"".join(pieces)
    assert joined == content(store)


def test_a_joined_store_reads_as_that_of_one_process_without_the_parts(
    store: Path, parts: list[Path], tmp_path: Path
) -> None:
    join(open_parts(parts), tmp_path / "joined")
    assert row_files(parts[0], "train")[0].stat().st_nlink == 2  # not copied
    for part in parts:
        shutil.rmtree(part)
    one, joined = TokenStore.open(store), TokenStore.open(tmp_path / "joined")
    assert joined.fingerprint() == one.fingerprint()
    for name in SAMPLES:
        rows, wanted = joined.split(name), one.split(name)
        assert len(rows) == len(wanted) and rows.keys() == wanted.keys()
        for split in (rows, pickle.loads(pickle.dumps(rows))):
            for index in range(len(wanted)):
                assert split.raw(index).tobytes() == wanted.raw(index).tobytes()
                assert split[index][0] == wanted[index][0] and split.key(index) == wanted.key(index)
        assert rows[-1][0] == wanted[-1][0]


def test_a_store_without_rows_in_some_parts(tmp_path: Path) -> None:
    """Eleven and three samples in batches of four are three batches and one."""
    parts = [make_part(tmp_path / str(number), number, batch=4) for number in range(1, COUNT + 1)]
    assert [len(TokenStore.open_part(part).split("val")) for part in parts] == [0, 0, 0, 3]
    join(open_parts(parts), tmp_path / "joined")
    assert len(TokenStore.open(tmp_path / "joined").split("val")) == 3


class Killed(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("call", ["link", "replace", "fsync"])
def test_a_join_that_was_killed_is_done_again(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    join(open_parts(parts), tmp_path / "whole")
    real, left = getattr(os, call), 0

    def deadly(*args: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(*args)

    deaths = 0
    for number in range(100):
        left = number
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, call, deadly)
                join(open_parts(parts), tmp_path / "again")
            break
        except Killed:
            deaths += 1
            if (tmp_path / "again" / "header.json").exists():  # it was the last call
                assert content(tmp_path / "again") == content(tmp_path / "whole")
    assert deaths >= 2 and content(tmp_path / "again") == content(tmp_path / "whole")


def test_rows_are_copied_where_they_cannot_be_linked(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join(open_parts(parts), tmp_path / "linked")

    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    join(open_parts(parts), tmp_path / "copied")
    assert content(tmp_path / "copied") == content(tmp_path / "linked")
    assert row_files(tmp_path / "copied", "train")[0].stat().st_nlink == 1


def test_a_part_is_no_token_store(parts: list[Path]) -> None:
    with pytest.raises(UserError, match=r"part2 holds part 2 of 4 of a token store; join the parts: task=tokenize"):
        TokenStore.open(parts[1])


def test_a_writer_goes_on_with_its_part_alone(parts: list[Path]) -> None:
    before = content(parts[0])
    assert make_part(parts[0], 1) and content(parts[0]) == before
    for number, changes in ((2, {}), (1, {"count": 3}), (1, {"batch": 3})):
        with pytest.raises(
            UserError, match=r"part1 holds a token store with (part|samples of train) .*, this run has \d"
        ) as error:
            make_part(parts[0], number, **changes)
        assert "\n" not in str(error.value)


REFUSED: dict[str, tuple[Callable[[list[Path], Path], list[Path]], str]] = {
    "missing": (
        lambda parts, _: [parts[0], parts[3]],
        r"of the 4 parts of .*part1 and others, 2, 3 are missing; finish",
    ),
    "doubled": (
        lambda parts, new: [*parts, Path(shutil.copytree(parts[1], new))],
        r"new and .*part2 both hold part 2 of 4 .*; leave one of them out",
    ),
    "given twice": (lambda parts, _: [*parts, parts[1]], r"part2 and .*part2 both hold part 2 of 4"),
    "of another tokenizer": (
        lambda parts, new: [*parts[:3], make_part(new, 4, text_tokenizer="text-2")],
        r"new has text_tokenizer text-2, .*part1 has text-1; they are parts of different token stores",
    ),
    "of another image tokenizer": (
        lambda parts, new: [*parts[:3], make_part(new, 4, image_tokenizer="image-2")],
        r"new has image_tokenizer image-2, ",
    ),
    "of other data": (
        lambda parts, new: [*parts[:3], make_part(new, 4, inputs={"data (train split)": "abcd"})],
        r"new has data \(train split\) abcd, .*part1 has 0123",
    ),
    "of another number": (lambda parts, new: [*parts[:3], make_part(new, 4, count=5)], r"new has parts 5, .* has 4"),
    "of other batches": (
        lambda parts, new: [*parts[:3], make_part(new, 4, batch=3)],
        r"new holds part 4 of 4 .* the parts before it end at sample 8 of train; .* same data\.batch_size",
    ),
    "nothing": (lambda parts, _: [], r"names no parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_fit_together(case: str, parts: list[Path], tmp_path: Path) -> None:
    change, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        open_parts(change(parts, tmp_path / "new"))
    assert str(error.value).startswith("token_store.join") and "\n" not in str(error.value)


def test_a_whole_store_is_no_part(store: Path, parts: list[Path]) -> None:
    with pytest.raises(UserError, match=r"token_store is no part of a token store, but a whole one"):
        open_parts([*parts[:3], store])


def test_a_part_that_was_not_finished(parts: list[Path]) -> None:
    edit_header(parts[2], complete=False)
    with pytest.raises(UserError, match=r"part3: the token store was not finished; run task=tokenize resume=true"):
        open_parts(parts)


@pytest.mark.parametrize(
    "change",
    [
        {"number": 0},
        {"number": 5},
        {"count": "4"},
        {"first": {"train": 0}},
        {"first": {"train": -1, "val": 0}},
        {"samples": {"train": 11, "test": 3}, "first": {"train": 0, "test": 0}},
        {"inputs": [1]},
        {"inputs": {"data": 1}},
        {"more": 1},
    ],
)
def test_a_header_whose_part_cannot_be(parts: list[Path], change: dict[str, object]) -> None:
    values = json.loads((parts[0] / "header.json").read_text())
    edit_header(parts[0], part=values["part"] | change)
    with pytest.raises(UserError, match=r"header\.json is damaged") as error:
        open_parts(parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train.keys.txt", "train.crc32"])
def test_a_damaged_part_is_found_when_it_is_joined(parts: list[Path], tmp_path: Path, name: str) -> None:
    data = bytearray((parts[1] / name).read_bytes())
    data[0] ^= 1
    (parts[1] / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"part2/{name} is damaged"):
        join(open_parts(parts), tmp_path / "joined")
    assert not (tmp_path / "joined" / "header.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"0002-of-0004\.bin does not exist; copy the token store again"),
        (
            lambda file: os.truncate(file, 20),
            r"0001-of-0004\.bin and the other pieces have 7 rows, header\.json says 9",
        ),
        (lambda file: os.truncate(file, 21), r"0002-of-0004\.bin has 21 bytes, no whole number of rows of 20"),
        (lambda file: file.rename(file.with_name("train.0002-of-0005.bin")), r"holds pieces of two joined stores"),
    ],
)
def test_a_piece_that_is_lost_or_cut(
    damage: Callable[[Path], object], message: str, parts: list[Path], tmp_path: Path
) -> None:
    join(open_parts(parts), tmp_path / "joined")
    damage(tmp_path / "joined" / "train.0002-of-0004.bin")
    with pytest.raises(UserError, match=message):
        TokenStore.open(tmp_path / "joined")


def test_a_damaged_row_of_a_piece_is_named(parts: list[Path], tmp_path: Path) -> None:
    join(open_parts(parts), tmp_path / "joined")
    file = tmp_path / "joined" / "train.0002-of-0004.bin"
    data = bytearray(file.read_bytes())
    data[25] ^= 16
    file.write_bytes(data)
    rows = TokenStore.open(tmp_path / "joined").split("train")
    first = len(TokenStore.open_part(parts[0]).split("train"))
    assert rows[first][0] is not None
    with pytest.raises(UserError, match=r"0002-of-0004\.bin: row 1 is damaged, its checksum is wrong"):
        rows[first + 1]


def test_a_writer_leaves_a_joined_store_alone(parts: list[Path], tmp_path: Path) -> None:
    join(open_parts(parts), tmp_path / "joined")
    before = content(tmp_path / "joined")
    assert TokenStoreWriter(tmp_path / "joined", **SETTINGS).header.complete
    assert content(tmp_path / "joined") == before
