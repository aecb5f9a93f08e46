"""What a token store says of itself comes back, and whatever is not what was written is refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from cogview_pl.data.token_store.header import SplitHeader, TokenStoreHeader, checksums_file, keys_file, rows_file
from cogview_pl.errors import UserError


def header(**changes: Any) -> TokenStoreHeader:
    values: dict[str, Any] = {
        "text_length": 4,
        "grid": (2, 3),
        "text_vocab_size": 500,
        "codebook_size": 64,
        "text_tokenizer": "文-1",
        "image_tokenizer": "image-1",
        "splits": {"train": SplitHeader(11, 9, 7, 2, 60, 123, 456), "val": SplitHeader(3)},
        "checksums": True,
    }
    return TokenStoreHeader(**values | changes)


def edit(folder: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    values = json.loads((folder / "header.json").read_text(encoding="utf-8")) | changes
    (folder / "header.json").write_text(json.dumps({name: values[name] for name in values if name not in remove}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checksums": False},
        {"format": "cogview", "large": True, "complete": True, "codebook_size": 8192},
        {"text_fields": ("text", "title"), "image_fields": ("source",)},
    ],
)
def test_a_header_comes_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    header(**changes).save(tmp_path)
    assert TokenStoreHeader.load(tmp_path) == header(**changes)
    written = json.loads((tmp_path / "header.json").read_text(encoding="utf-8"))
    assert ("image_fields" in written) == ("image_fields" in changes)  # without them as in stores of earlier versions
    text = (tmp_path / "header.json").read_text(encoding="utf-8")
    assert "文-1" in text and text.startswith('{\n "version": 1,\n "dtype": "') and text.endswith("\n}\n")
    values = json.loads(text)
    noted = values.pop("crc32", None)
    if header(**changes).checksums:
        assert noted == zlib.crc32(json.dumps(values, sort_keys=True).encode())
        (tmp_path / "header.json").write_text(json.dumps({"crc32": noted, **dict(reversed(values.items()))}))
        assert TokenStoreHeader.load(tmp_path) == header(**changes)  # spaces and order say nothing
    else:
        assert noted is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("text_tokenizer", "文-2"), ("text_vocab_size", 501), ("complete", True), ("grid", [3, 2]), ("checksums", False)],
)
def test_whatever_is_changed_in_a_header_is_found(tmp_path: Path, name: str, value: object) -> None:
    header().save(tmp_path)
    edit(tmp_path, **{name: value})
    with pytest.raises(
        UserError, match=r"header\.json is damaged \(its checksum is wrong\); delete the folder and run task=tokenize"
    ):
        TokenStoreHeader.load(tmp_path)


@pytest.mark.parametrize("checksum", [None, 0, "abc"])
def test_a_header_that_says_it_has_checksums_has_its_own(tmp_path: Path, checksum: object) -> None:
    header().save(tmp_path)
    edit(tmp_path, crc32=checksum)
    with pytest.raises(UserError, match=r"header\.json is damaged \(its checksum is wrong\)"):
        TokenStoreHeader.load(tmp_path)
    edit(tmp_path, remove=("crc32",))
    with pytest.raises(UserError, match=r"header\.json is damaged \(its checksum is wrong\)"):
        TokenStoreHeader.load(tmp_path)


def test_headers_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Which had no checksums, then none of the keys, and neither formats nor large codes."""
    old = SplitHeader(11, 9, 7, 2, 60, None, None)
    header(checksums=False, splits={"train": old}).save(tmp_path)
    values = json.loads((tmp_path / "header.json").read_text())["splits"]["train"]
    for name in ("keys_crc32", "sums_crc32"):
        assert values.pop(name) is None
    edit(tmp_path, remove=("checksums", "format", "large"), splits={"train": values})
    assert TokenStoreHeader.load(tmp_path) == header(checksums=False, splits={"train": old})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "has version 2, this program reads 1"),
        ({"version": None}, "has version None, this program reads 1"),
        ({"dtype": "int32"}, r"is damaged \(dtype is int32, the sizes ask for uint16\)"),
        ({"grid": [2, 3, 4]}, r"is damaged \(too many values"),
        ({"grid": 3}, r"is damaged \(cannot unpack"),
        ({"splits": [1]}, r"is damaged \('list' object has no attribute 'items'\)"),
        ({"splits": {"train": {"next": 3}}}, r"is damaged \(.*'source'"),
        ({"splits": {"train": {"source": 3, "other": 1}}}, r"is damaged \(.*'other'"),
        ({"text_tokenizer": 5}, r"is damaged \(text_tokenizer is 5\)"),
        ({"image_tokenizer": None}, r"is damaged \(image_tokenizer is None\)"),
        ({"complete": 1}, r"is damaged \(complete is 1\)"),
        ({"large": "no"}, r"is damaged \(large is 'no'\)"),
        ({"codebook_size": 0}, r"is damaged \(codebook_size is 0\)"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    header(checksums=False).save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"^{tmp_path}/header\.json {words}.*; delete the folder and run") as error:
        TokenStoreHeader.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"is not JSON \(Expecting"),
        (b"\xff", r"is not JSON \('utf-8' codec"),
        (b"[" * 100_000, r"is not JSON \(maximum recursion"),
        (b"[1]", "has version None"),
        (b'{"version": 1}', r"is damaged \('dtype'\)"),
        (b" " * 2**20 + b"1", "has 1,048,577 bytes, at most 1,048,576 are read; copy the token store again"),
    ],
)
def test_what_is_no_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "header.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/header\.json {words}"):
        TokenStoreHeader.load(tmp_path)


def test_a_store_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path} has no header\.json: not a token store; run task=tokenize$"):
        TokenStoreHeader.load(tmp_path)
    (tmp_path / "header.json").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/header\.json is a folder, not a file; copy the token store"):
        TokenStoreHeader.load(tmp_path)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((3, 4), "0 cut, 0 rows, 4 done of 3"),
        ((3, 2, 3), "0 cut, 3 rows, 2 done of 3"),
        ((3, 3, 2, 3), "3 cut, 2 rows, 3 done of 3"),
        ((-1,), "source is -1"),
        ((3, 0, 0, 0, -1), "key_bytes is -1"),
        ((3, 0, 0, 0, 0, -1), "keys_crc32 is -1"),
        ((3, 0, 0, 0, 0, None, 0.5), r"sums_crc32 is 0\.5"),
        ((3, True), "next is True"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{words}$"):
        SplitHeader(*counts)
    assert SplitHeader(0) == SplitHeader(0, 0, 0, 0, 0, 0, 0)
    SplitHeader(3, 3, 3, 3)


def test_the_files_of_a_split(tmp_path: Path) -> None:
    names = [file(tmp_path, "val") for file in (rows_file, keys_file, checksums_file)]
    assert names == [tmp_path / "val.bin", tmp_path / "val.keys.txt", tmp_path / "val.crc32"]
