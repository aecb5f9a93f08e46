"""Rows on disk: which numbers they are, that they come back, and what is said of those that cannot be read."""

from __future__ import annotations

import errno
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogview_pl.data.token_store.rows import RowLayout, TokenRows, WithoutText
from cogview_pl.errors import UserError

SIZES: dict[str, Any] = {"text_length": 3, "grid": (1, 2), "text_vocab_size": 50, "codebook_size": 9}
TEXT_TOKENS = [[7, 0], [1, 2, 3, 4], []]
CODES = torch.tensor([[[0, 8]], [[1, 2]], [[3, 4]]])
LARGE = torch.arange(24).reshape(3, 2, 4) % 9


def written(folder: Path, layout: RowLayout, checksums: bool = True, skip: int = 0) -> TokenRows:
    """The three samples in a file, of which the first are skipped."""
    rows = layout.pack({"text": TEXT_TOKENS}, CODES, LARGE if layout.large else None)
    (folder / "train.bin").write_bytes(rows.tobytes())
    sums = np.array([zlib.crc32(row.tobytes()) for row in rows], "<u4")
    (folder / "train.crc32").write_bytes(sums.tobytes())
    return TokenRows(folder / "train.bin", layout, range(skip, 3), folder / "train.crc32" if checksums else None)


def test_native_rows_hold_pieces_and_codes_as_they_are() -> None:
    layout = RowLayout(**SIZES)
    assert layout.pack({"text": TEXT_TOKENS}, CODES).tolist() == [
        [7, 0, 65535, 0, 8],
        [1, 2, 3, 1, 2],
        [65535, 65535, 65535, 3, 4],
    ]
    assert (layout.dtype, layout.sentinel, layout.text_ids) == (np.dtype("<u2"), 65535, range(50))
    assert (layout.row_length, layout.row_bytes, layout.large_grid) == (5, 10, (2, 4))


def test_rows_of_the_original_hold_ids_of_the_joint_vocabulary() -> None:
    """In which the text tokens come behind the codes."""
    layout = RowLayout(**SIZES, format="cogview")
    assert layout.pack({"text": TEXT_TOKENS}, CODES).tolist() == [
        [16, 9, -1, 0, 8],
        [10, 11, 12, 1, 2],
        [-1, -1, -1, 3, 4],
    ]
    assert (layout.dtype, layout.sentinel, layout.text_ids) == (np.dtype("<i4"), -1, range(9, 59))
    assert (layout.row_length, layout.row_bytes) == (5, 20)


@pytest.mark.parametrize("large", [False, True])
def test_codes_of_further_images_follow_those_of_the_sample(tmp_path: Path, large: bool) -> None:
    layout = RowLayout(**SIZES, large=large, image_fields=("source", "mask"))
    others = {"source": CODES.flip(0), "mask": CODES.flip(2)}
    rows = layout.pack({"text": TEXT_TOKENS}, CODES, LARGE if large else None, others)
    assert rows[0, :9].tolist() == [7, 0, 65535, 0, 8, 3, 4, 8, 0]
    assert layout.row_length == 9 + 8 * large
    (tmp_path / "train.bin").write_bytes(rows.tobytes())
    read = TokenRows(tmp_path / "train.bin", layout, range(3))
    for number in range(3):
        found = read.others(number)
        assert list(found) == ["source", "mask"] and found["source"].dtype == torch.int64
        assert all(torch.equal(found[name], others[name][number]) for name in found)
        assert torch.equal(read[number][1], CODES[number])
        assert not large or torch.equal(read.large(number), LARGE[number])
        assert WithoutText(read).others(number).keys() == found.keys()


@pytest.mark.parametrize("names", [("a", "a"), ("",), (3,)])
def test_names_of_further_images_differ(names: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="image_fields is"):
        RowLayout(**SIZES, image_fields=names)
    with pytest.raises(ValueError, match="whose rows hold one image"):
        RowLayout(**SIZES, format="cogview", image_fields=("source",))


@pytest.mark.parametrize("format", ["native", "cogview"])
def test_large_codes_come_behind_the_others(format: str) -> None:
    layout = RowLayout(**SIZES, format=format, large=True)
    assert (layout.row_length, layout.row_bytes) == (13, 13 * layout.dtype.itemsize)
    rows = layout.pack({"text": TEXT_TOKENS}, CODES, LARGE)
    assert rows[1, 3:].tolist() == [1, 2, 8, 0, 1, 2, 3, 4, 5, 6]
    for row, text_tokens, codes, large in zip(rows, TEXT_TOKENS, CODES, LARGE, strict=True):
        found, small = layout.unpack(row)
        twice = layout.unpack_large(row)
        assert found == {"text": text_tokens[:3]}
        assert torch.equal(small, codes) and torch.equal(twice, large)
        assert small.dtype == twice.dtype == torch.int64


@pytest.mark.parametrize(
    ("sizes", "small"), [((65535, 9), True), ((65536, 9), False), ((9, 65535), True), ((9, 65536), False)]
)
def test_two_bytes_do_where_every_id_is_below_the_sentinel(sizes: tuple[int, int], small: bool) -> None:
    layout = RowLayout(**SIZES | {"text_vocab_size": sizes[0], "codebook_size": sizes[1]})
    assert (layout.dtype.str, layout.sentinel) == (("<u2", 65535) if small else ("<i4", -1))
    last = [sizes[0] - 1]
    assert layout.unpack(layout.pack({"text": [last]}, CODES[:1])[0])[0] == {"text": last}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "lmdb"}, "format is lmdb, known are native and cogview"),
        ({"text_length": 0}, "text_length is 0"),
        ({"text_vocab_size": -5}, "text_vocab_size is -5"),
        ({"codebook_size": 9.0}, r"codebook_size is 9\.0"),
        ({"codebook_size": True}, "codebook_size is True"),
        ({"text_vocab_size": None}, "text_vocab_size is None"),
        ({"grid": (0, 2)}, "y is 0"),
        ({"grid": (2, "3")}, "x is '3'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{words}$"):
        RowLayout(**SIZES | change)
    least = RowLayout(text_length=1, grid=(1, 1), text_vocab_size=1, codebook_size=1)
    assert least.row_length == 2


# --- files of rows


@pytest.mark.parametrize("checksums", [True, False])
def test_rows_are_read_at_any_place(tmp_path: Path, checksums: bool) -> None:
    rows = written(tmp_path, RowLayout(**SIZES, large=True), checksums, skip=1)
    assert len(rows) == 2
    for index, number in ((1, 2), (0, 1), (-1, 2), (-2, 1)):
        text_tokens, codes = rows[index]
        assert text_tokens == {"text": TEXT_TOKENS[number][:3]}
        assert torch.equal(codes, CODES[number]) and torch.equal(rows.large(index), LARGE[number])
        assert rows.key(index) == f"row {number} of train.bin"
    assert rows.raw(0).tolist() == [7, 0, 65535, 0, 8, *LARGE[0].flatten().tolist()]  # counted from the beginning
    for index in (2, -3):
        with pytest.raises(IndexError):
            rows[index]


def test_rows_without_text_are_the_same_images(tmp_path: Path) -> None:
    rows = written(tmp_path, RowLayout(**SIZES, large=True))
    without = WithoutText(rows)
    assert len(without) == 3 and without.layout is rows.layout
    for index in range(3):
        text_tokens, codes = without[index]
        assert (
            text_tokens == {"text": []}
            and torch.equal(codes, CODES[index])
            and torch.equal(without.large(index), LARGE[index])
        )
        assert without.key(index) == f"row {index} of train.bin"


def test_a_copy_in_another_process_opens_the_files_for_itself(tmp_path: Path) -> None:
    rows = written(tmp_path, RowLayout(**SIZES))
    assert rows[0][0]["text"] == [7, 0]
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[1][0]["text"] == [1, 2, 3] and rows[1][0]["text"] == [1, 2, 3]
    before = os.open(os.devnull, os.O_RDONLY)
    os.close(before)
    for index in (0, 1, 2, 0):
        assert rows[index]
    after = os.open(os.devnull, os.O_RDONLY)
    os.close(after)
    assert after == before  # and only once


def test_a_row_that_is_not_what_was_written_is_named(tmp_path: Path) -> None:
    rows = written(tmp_path, RowLayout(**SIZES), skip=1)
    data = bytearray((tmp_path / "train.bin").read_bytes())
    data[10] ^= 1
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(UserError, match=rf"^{tmp_path}/train\.bin: row 1 is damaged, its checksum is wrong; copy the"):
        rows[0]
    assert rows[1][0]["text"] == []
    assert TokenRows(rows.file, rows.layout, range(3))[1][0]["text"] == [0, 2, 3]  # has nothing to compare it with


@pytest.mark.parametrize(("name", "size"), [("train.bin", 10), ("train.crc32", 4)])
def test_a_row_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    rows, file = written(tmp_path, RowLayout(**SIZES)), tmp_path / name
    os.truncate(file, 2 * size + 1)
    assert rows[1]
    with pytest.raises(UserError, match=rf"^{file} has become shorter: row 2 is missing; copy the token store again$"):
        rows[2]
    with monkeypatch.context() as broken, pytest.raises(UserError) as error:
        broken.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        rows[0]
    assert str(error.value) == f"{rows.file} cannot be read (Input/output error); copy the token store again"
    file.unlink()
    with pytest.raises(UserError, match=rf"^{file} does not exist; copy the token store again$"):
        TokenRows(rows.file, rows.layout, rows.span, rows.checksums)[0]
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file} is a folder, not a file; copy the token store again$"):
        TokenRows(rows.file, rows.layout, rows.span, rows.checksums)[0]
