"""A token store by hand: each byte of its files, what a writer refuses, and what is said of files that are damaged."""

from __future__ import annotations

import errno
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogview_pl.data.token_store.header import SplitHeader, TokenStoreHeader
from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError

SETTINGS: dict[str, Any] = {
    "text_length": 2,
    "grid": (1, 2),
    "text_vocab_size": 50,
    "codebook_size": 9,
    "text_tokenizer": "text-1",
    "image_tokenizer": "image-1",
    "splits": {"train": 4, "val": 1},
}
CODES = torch.tensor([[[0, 8]], [[1, 2]], [[3, 4]]])
LARGE = torch.arange(24).reshape(3, 2, 4) % 9
KEYS = ["a", "图\n1", "c\udcff"]
NAMES = "a\n图 1\nc\\udcff\n".encode()
ROWS = [[7, 65535, 0, 8], [1, 2, 1, 2], [65535, 65535, 3, 4]]


def sums_of(rows: list[list[int]], kind: str = "<u2") -> bytes:
    return np.array([zlib.crc32(np.array(row, kind).tobytes()) for row in rows], "<u4").tobytes()


def begun(folder: Path, **changes: Any) -> TokenStoreWriter:
    """Two of the four training samples, one of which has been skipped."""
    writer = TokenStoreWriter(folder, **SETTINGS | changes)
    writer.append("train", {"text": [[7]]}, CODES[:1], KEYS[:1], 2)
    return writer


def finished(folder: Path) -> TokenStore:
    writer = begun(folder)
    writer.append("train", {"text": [[1, 2, 3], []]}, CODES[1:], KEYS[1:], 4)
    writer.append("val", {"text": [[5, 6]]}, CODES[:1], ["v"], 1)
    writer.finish()
    return TokenStore.open(folder)


def test_files_and_header_after_two_batches(tmp_path: Path) -> None:
    store = finished(tmp_path / "new" / "token_store")
    folder = store.folder
    assert sorted(os.listdir(folder)) == [
        *("header.json", "train.bin", "train.crc32", "train.keys.txt", "val.bin", "val.crc32", "val.keys.txt"),
    ]
    assert np.fromfile(folder / "train.bin", "<u2").reshape(3, 4).tolist() == ROWS
    assert (folder / "train.keys.txt").read_bytes() == NAMES
    assert (folder / "train.crc32").read_bytes() == sums_of(ROWS)
    splits = {
        "train": SplitHeader(4, 4, 3, 1, len(NAMES), zlib.crc32(NAMES), zlib.crc32(sums_of(ROWS))),
        "val": SplitHeader(1, 1, 1, 0, 2, zlib.crc32(b"v\n"), zlib.crc32(sums_of([[5, 6, 0, 8]]))),
    }
    assert store.header == TokenStoreHeader(**SETTINGS | {"splits": splits}, complete=True, checksums=True)
    train, val = store.split("train"), store.split("val")
    assert train.keys() == [train.key(index) for index in range(3)] == ["a", "图 1", r"c\udcff"]
    assert [train[index][0]["text"] for index in (0, 1, 2, -1)] == [[7], [1, 2], [], []]
    assert val.keys() == ["v"] and val.key(-1) == "v" and val[0][0]["text"] == [5, 6]


def test_large_codes_come_back_in_both_formats(tmp_path: Path) -> None:
    for format in ("native", "cogview"):
        writer = TokenStoreWriter(tmp_path / format, **SETTINGS | {"splits": {"train": 3}}, format=format, large=True)
        writer.append("train", {"text": [[7], [1, 2, 3], []]}, CODES, KEYS, 3, LARGE)
        writer.finish()
        rows = TokenStore.open(tmp_path / format).split("train")
        for index in range(3):
            assert torch.equal(rows[index][1], CODES[index]) and torch.equal(rows.large(index), LARGE[index])
        assert rows[0][0]["text"] == [7] and rows[1][0]["text"] == [1, 2]


def test_a_writer_goes_on_where_it_was(tmp_path: Path) -> None:
    writer = begun(tmp_path)
    assert [writer.resume_index(name) for name in ("train", "val")] == [2, 0]
    for file, data in {
        "train.bin": b"half a row",
        "train.crc32": b"su",
        "train.keys.txt": b"half",
        "val.bin": b"x",
    }.items():
        with (tmp_path / file).open("ab") as stream:
            stream.write(data)
    again = TokenStoreWriter(tmp_path, **SETTINGS)
    assert [again.resume_index(name) for name in ("train", "val")] == [2, 0]
    assert (tmp_path / "train.bin").read_bytes() == np.array(ROWS[0], "<u2").tobytes()
    assert (tmp_path / "train.crc32").read_bytes() == sums_of(ROWS[:1])
    assert (tmp_path / "train.keys.txt").read_bytes() == b"a\n" and (tmp_path / "val.bin").read_bytes() == b""


def test_a_store_that_an_earlier_version_began_gets_no_checksums_of_its_own(tmp_path: Path) -> None:
    """A checksum of what comes now would not be one of the whole."""
    begun(tmp_path)
    values = json.loads((tmp_path / "header.json").read_text())
    for name in ("keys_crc32", "sums_crc32"):
        del values["splits"]["train"][name]
    values["crc32"] = zlib.crc32(
        json.dumps({name: values[name] for name in values if name != "crc32"}, sort_keys=True).encode()
    )
    (tmp_path / "header.json").write_text(json.dumps(values))
    writer = TokenStoreWriter(tmp_path, **SETTINGS)
    writer.append("train", {"text": [[1, 2, 3], []]}, CODES[1:], KEYS[1:], 4)
    writer.append("val", {"text": []}, CODES[:0], [], 1)
    writer.finish()
    store = TokenStore.open(tmp_path)
    train = store.header.splits["train"]
    assert (train.keys_crc32, train.sums_crc32, train.key_bytes) == (None, None, len(NAMES))
    assert len(store.fingerprint()) == 32 and store.split("train").keys()[0] == "a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": ["a", "b"], "next_index": 4}, "2 keys, 1 texts, codes (1, 1, 2) do not fit"),
        ({"text_tokens": {"text": [[1], [2]]}}, "1 keys, 2 texts, codes (1, 1, 2) do not fit"),
        ({"codes": CODES[:1].mT}, "1 keys, 1 texts, codes (1, 2, 1) do not fit"),
        ({"next_index": 2}, "next_index=2: 2 done, 1 new, of 4"),
        ({"next_index": 5}, "next_index=5: 2 done, 1 new, of 4"),
        ({"codes": CODES[:1] + 1}, "codes must be in [0, 9)"),
        ({"codes": CODES[:1] - 1}, "codes must be in [0, 9)"),
        ({"text_tokens": {"text": [[50]]}}, "text tokens must be in [0, 50)"),
        ({"text_tokens": {"text": [[0, -1]]}}, "text tokens must be in [0, 50)"),
        ({"large": LARGE[:1]}, "large=False: large codes (1, 2, 4)"),
    ],
)
def test_samples_that_do_not_fit_leave_the_store_as_it_was(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    writer = begun(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    arguments = {"text_tokens": {"text": [[49, 0]]}, "codes": CODES[:1], "keys": ["b"], "next_index": 3}
    with pytest.raises(ValueError) as error:
        writer.append("train", **arguments | change)
    assert str(error.value) == words
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    writer.append("train", **arguments)
    with pytest.raises(ValueError, match="split train: 3 of 4 samples are done"):
        writer.finish()


@pytest.mark.parametrize(
    ("large", "words"),
    [
        (None, "large=True: large codes None"),
        (LARGE[:1, :1], r"large=True: large codes \(1, 1, 4\)"),
        (LARGE[:2], r"large=True: large codes \(2, 2, 4\)"),
        (LARGE[:1] + 8, r"codes must be in \[0, 9\)"),
        (LARGE[:1] - 1, r"codes must be in \[0, 9\)"),
    ],
)
def test_large_codes_that_do_not_fit_are_refused(tmp_path: Path, large: torch.Tensor | None, words: str) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS, large=True)
    with pytest.raises(ValueError, match=f"^{words}$"):
        writer.append("train", {"text": [[7]]}, CODES[:1], ["a"], 1, large)
    assert not os.path.getsize(tmp_path / "train.bin")


def test_a_store_with_large_codes_is_another_one(tmp_path: Path) -> None:
    TokenStoreWriter(tmp_path, **SETTINGS)
    with pytest.raises(
        UserError, match=rf"^{tmp_path} holds a token store with large False, this run has True; go on with that one"
    ):
        TokenStoreWriter(tmp_path, **SETTINGS, large=True)


# --- damage


@pytest.mark.parametrize("name", ["train.bin", "train.keys.txt", "train.crc32"])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_of_another_size_is_refused_when_the_store_is_opened(tmp_path: Path, name: str, more: int) -> None:
    finished(tmp_path)
    file = tmp_path / name
    size = file.stat().st_size
    rows, width = {"train.bin": (3, 8), "train.crc32": (3, 4)}.get(name, (size, 1))
    os.truncate(file, size + more)
    words = (
        f"has {size + more} bytes, header.json says {rows} rows of {width}; the file is truncated or of another store"
    )
    with pytest.raises(UserError, match=rf"^{file} {words}: copy it again or run task=tokenize again$"):
        TokenStore.open(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=rf"^{file} has 0 bytes, header\.json says {rows} rows of {width}; "):
        TokenStore.open(tmp_path)
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file} is a folder, not a file; copy the token store again or run task="):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "train.keys.txt", "train.crc32"])
def test_a_file_that_cannot_be_gone_on_with_is_refused(tmp_path: Path, name: str) -> None:
    begun(tmp_path)
    file = tmp_path / name
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    words = f"has {len(content) - 1} bytes, header.json says {len(content)}: data were lost; delete the folder and run"
    with pytest.raises(UserError, match=rf"^{file} {words}"):
        TokenStoreWriter(tmp_path, **SETTINGS)
    file.unlink()
    with pytest.raises(UserError, match=rf"^{file} has 0 bytes, header\.json says {len(content)}: data were lost; "):
        TokenStoreWriter(tmp_path, **SETTINGS)
    (tmp_path / "elsewhere").write_bytes(content + b"more")
    file.unlink()
    file.symlink_to("elsewhere")
    with pytest.raises(
        UserError, match=rf"^{file} cannot be written \(Too many levels of symbolic links\); delete the"
    ):
        TokenStoreWriter(tmp_path, **SETTINGS)
    assert (tmp_path / "elsewhere").read_bytes() == content + b"more"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file} is a folder, not a file; delete the folder and run task=tokenize"):
        TokenStoreWriter(tmp_path, **SETTINGS)


def test_a_full_disk_under_a_writer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context, pytest.raises(UserError, match=rf"^{tmp_path}/train\.bin: no space left on"):
        context.setattr(os, "fsync", full)
        TokenStoreWriter(tmp_path, **SETTINGS)


def test_keys_that_are_not_what_was_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = finished(tmp_path).split("train")
    file = tmp_path / "train.keys.txt"
    for damaged, words in (
        (b"b" + NAMES[1:], "is damaged, its checksum is wrong"),
        (NAMES + b"x", f"has {len(NAMES) + 1} bytes, at most {len(NAMES)} are read"),
    ):
        file.write_bytes(damaged)
        for read in (rows.keys, lambda: rows.key(0)):
            with pytest.raises(UserError, match=rf"^{file} {words}; copy the token store again or run task=tokenize"):
                read()
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file} is a folder, not a file; copy the token store again"):
        rows.keys()
    file.rmdir()
    file.write_bytes(NAMES)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(UserError, match=rf"^{file} cannot be read \(Input/output error\); copy the token store"):
            rows.keys()


def test_the_fingerprint_tells_rows_keys_and_splits_apart(tmp_path: Path) -> None:
    store = finished(tmp_path / "one")
    found = store.fingerprint()
    assert found == finished(tmp_path / "two").fingerprint() == TokenStore.open(tmp_path / "one").fingerprint()
    (tmp_path / "one" / "val.bin").write_bytes(b"")  # rows are known by their checksums
    assert store.fingerprint() == found
    sums = tmp_path / "one" / "train.crc32"
    whole = sums.read_bytes()
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-4]):
        sums.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"^{sums} is damaged or of another store \(the header says so\); copy the"
        ):
            store.fingerprint()
    sums.write_bytes(whole + b"more")
    with pytest.raises(
        UserError, match=rf"^{sums} has {len(whole) + 4} bytes, at most {len(whole)} are read; copy the"
    ):
        store.fingerprint()
    sums.unlink()
    with pytest.raises(UserError, match=rf"^{sums} does not exist; copy the token store again"):
        store.fingerprint()
