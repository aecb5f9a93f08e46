"""Damaged, foreign and unfinished token stores: each is named in one line, and none is read as another."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cogview_pl.data.token_store.store import TokenStore
from cogview_pl.data.token_store.writer import TokenStoreWriter
from cogview_pl.errors import UserError

from .stores import SETTINGS, content, edit_header, sample, tokenize


def test_lost_rows_are_not_papered_over(store: Path) -> None:
    edit_header(store, complete=False)
    for name in ("train.bin", "val.keys.txt"):
        data = (store / name).read_bytes()
        (store / name).write_bytes(data[:-1])
        with pytest.raises(UserError, match=rf"{name} has {len(data) - 1} bytes.*data were lost; delete the folder"):
            TokenStoreWriter(store, **SETTINGS)
        (store / name).write_bytes(data)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS)
    before = content(tmp_path)
    codes = torch.zeros(1, 2, 3, dtype=torch.int64)
    calls: list[tuple[Any, ...]] = [
        ({"text": [[1]]}, codes, ["a", "b"], 2),
        ({"text": [[1], [2]]}, codes, ["a"], 2),
        ({"text": [[1]]}, codes.mT, ["a"], 1),
        ({"text": [[1]]}, codes, ["a"], 0),
        ({"text": [[1]]}, codes, ["a"], 12),
        ({"text": [[1]]}, codes + 64, ["a"], 1),
        ({"text": [[1]]}, codes - 1, ["a"], 1),
        ({"text": [[500]]}, codes, ["a"], 1),
        ({"text": [[-1]]}, codes, ["a"], 1),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            writer.append("train", *call)
    with pytest.raises(ValueError, match="split train: 0 of 11 samples are done"):
        writer.finish()
    assert content(tmp_path) == before


# --- opening


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "header.json").unlink(),
            r"has no header\.json: not a token store; run task=tokenize$",
        ),
        (lambda f: (f / "header.json").write_text("{"), r"header\.json is not JSON .*delete the folder"),
        (lambda f: (f / "header.json").write_bytes(b"\xff"), r"header\.json is not JSON"),
        (lambda f: (f / "header.json").write_text("[]"), r"has version None, this program reads 1"),
        (lambda f: edit_header(f, version=2), r"has version 2, this program reads 1; delete the folder"),
        (lambda f: (f / "header.json").write_text('{"version": 1}'), r"header\.json is damaged \('dtype'\)"),
        (lambda f: edit_header(f, other=2), r"header\.json is damaged \(.*'other'"),
        (lambda f: edit_header(f, grid=3), r"header\.json is damaged"),
        (lambda f: edit_header(f, format="lmdb"), r"header\.json is damaged \(format is lmdb"),
        (lambda f: edit_header(f, dtype="int32"), r"damaged \(dtype is int32, the sizes ask for uint16\)"),
        (
            lambda f: edit_header(f, complete=False),
            r": the token store was not finished; run task=tokenize resume=true$",
        ),
        (
            lambda f: os.truncate(f / "train.bin", 179),
            r"train\.bin has 179 bytes, .* 9 rows of 20; .* truncated",
        ),
        (lambda f: os.truncate(f / "val.bin", 80), r"val\.bin has 80 bytes"),
        (lambda f: (f / "val.bin").unlink(), r"val\.bin has 0 bytes"),
    ],
)
def test_what_is_wrong_with_a_store(store: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(store)
    with pytest.raises(UserError, match=message) as error:
        TokenStore.open(store)
    assert str(store) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none has no header\.json: not a token store; run task=tokenize"):
        TokenStore.open(tmp_path / "none")


def test_a_store_from_before_there_were_formats(store: Path) -> None:
    edit_header(store)
    values = json.loads((store / "header.json").read_text())
    del values["format"]
    (store / "header.json").write_text(json.dumps(values))
    assert TokenStore.open(store).split("train")[1][0]["text"] == sample("train", 1)[0]  # type: ignore[index]


def test_an_unknown_split(store: Path) -> None:
    with pytest.raises(UserError, match=r": no split test in the token store, only train, val; "):
        TokenStore.open(store).split("test")


def test_the_tokenizers_must_be_those_of_the_store(store: Path) -> None:
    opened = TokenStore.open(str(store))
    opened.require(text_tokenizer="text-1", image_tokenizer="image-1")
    with pytest.raises(UserError, match=r"made with text_tokenizer text-1, this run uses text-2; use that one"):
        opened.require(text_tokenizer="text-2", image_tokenizer="image-1")
    with pytest.raises(UserError, match=r"made with image_tokenizer image-1, this run uses image-2; .*task=tokenize"):
        opened.require(text_tokenizer="text-1", image_tokenizer="image-2")


# --- damage


@pytest.mark.parametrize("name", ["header.json", "train.bin", "train.crc32", "train.keys.txt"])
def test_a_flipped_bit_is_never_read_as_something_else(store: Path, name: str) -> None:
    wanted = everything(store)
    file = store / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        file.write_bytes(data)
        try:
            found = everything(store)
        except UserError as error:
            assert str(store) in str(error) and "\n" not in str(error)
        else:
            assert name == "header.json"  # white space says nothing
            assert found == wanted


def everything(store: Path) -> list[tuple[str, list[int], list[list[int]]]]:
    rows = TokenStore.open(store).split("train")
    samples = [(key, *rows[index]) for index, key in enumerate(rows.keys())]
    return [(key, text_tokens, codes.tolist()) for key, text_tokens, codes in samples]


def test_one_key_is_compared_with_the_checksum_of_all(store: Path) -> None:
    rows = TokenStore.open(store).split("train")
    assert [rows.key(0), rows.key(-1)] == ["train/图0", "train/图10"]
    file = store / "train.keys.txt"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1  # far behind the first key, which the same object has read before
    file.write_bytes(data)
    for read in (rows.keys, lambda: rows.key(0)):
        with pytest.raises(
            UserError, match=r"train\.keys\.txt is damaged, its checksum is wrong; copy the token store"
        ):
            read()
    file.unlink()
    with pytest.raises(UserError, match=r"train\.keys\.txt does not exist; copy the token store again"):
        rows.keys()


def test_keys_of_an_earlier_version_are_read_without_a_checksum(store: Path) -> None:
    values = json.loads((store / "header.json").read_text())
    for split in values["splits"].values():
        del split["keys_crc32"]
    edit_header(store, splits=values["splits"])
    rows = TokenStore.open(store).split("train")
    assert rows.keys()[1] == rows.key(1) == "train/图1"
    data = (store / "train.keys.txt").read_bytes()
    for damaged, message in (
        (data.replace("图0".encode(), b"\xff\xff\xff\xff"), r"is damaged, it is not UTF-8 text; copy the token store"),
        (data.replace(b"\n", b" ", 1), r"has 8 keys for 9 rows; copy the token store"),
    ):
        (store / "train.keys.txt").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            TokenStore.open(store).split("train").keys()
    with pytest.raises(UserError, match=r"has no key for row 8; copy the token store"):
        TokenStore.open(store).split("train").key(8)


def test_a_writer_that_goes_on_with_damaged_keys_does_not_vouch_for_them(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path, **SETTINGS)
    writer.append("train", {"text": [[1]]}, torch.zeros(1, 2, 3, dtype=torch.int64), ["x"], 1)
    (tmp_path / "train.keys.txt").write_bytes(b"y\n")
    tokenize(tmp_path)
    with pytest.raises(UserError, match=r"train\.keys\.txt is damaged"):
        TokenStore.open(tmp_path).split("train").keys()


@pytest.mark.parametrize("name", ["header.json", "train.bin", "train.keys.txt", "train.crc32"])
def test_what_is_no_file_is_never_opened(store: Path, name: str) -> None:
    rows = TokenStore.open(store).split("train")
    (store / name).unlink()
    os.mkfifo(store / name)
    with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; copy the token store again"):
        TokenStore.open(store)
    if name != "header.json":
        with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; copy the token store again"):
            rows.keys() if "keys" in name else rows[0]
    with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file; "):
        TokenStoreWriter(store, **SETTINGS)
    (store / name).unlink()
    (store / name).symlink_to(name)
    with pytest.raises(
        UserError, match=rf"{name} cannot be read \(Too many levels of symbolic links\); copy the token"
    ):
        TokenStore.open(store)
    with pytest.raises(UserError, match=rf"{name} cannot be read \(Too many levels of symbolic links\); "):
        TokenStoreWriter(store, **SETTINGS)


def test_a_header_of_absurd_size_is_not_read(store: Path) -> None:
    os.truncate(store / "header.json", 2**40)
    with pytest.raises(UserError, match=r"header\.json has 1,099,511,627,776 bytes, at most 1,048,576 are read; "):
        TokenStore.open(store)


# --- fingerprint


def test_the_fingerprint_is_that_of_header_rows_and_keys(store: Path, tmp_path: Path) -> None:
    fingerprint = TokenStore.open(store).fingerprint()
    assert len(fingerprint) == 32
    tokenize(tmp_path / "again", batch=3)
    assert TokenStore.open(tmp_path / "again").fingerprint() == fingerprint

    def of(text_token: int, key: str, **change: object) -> str:
        folder = tmp_path / f"{text_token}{key}{''.join(change)}"
        writer = TokenStoreWriter(folder, **SETTINGS | {"splits": {"train": 1}} | change)
        writer.append("train", {"text": [[text_token]]}, torch.zeros(1, 2, 3, dtype=torch.int64), [key], 1)
        writer.finish()
        return TokenStore.open(folder).fingerprint()

    others = [of(1, "a"), of(2, "a"), of(1, "b"), of(1, "a", text_tokenizer="text-2"), of(1, "a", codebook_size=65)]
    assert len({fingerprint, *others}) == 6


def test_rows_of_another_store_are_refused_though_their_checksums_are_right(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "swapped")
    rows, sums = (tmp_path / "swapped" / f"train.{kind}" for kind in ("bin", "crc32"))
    data, size = rows.read_bytes(), rows.stat().st_size // (sums.stat().st_size // 4)
    rows.write_bytes(data[size:] + data[:size])
    sums.write_bytes(sums.read_bytes()[4:] + sums.read_bytes()[:4])
    with pytest.raises(UserError, match=r"train\.crc32 is damaged or of another store"):
        TokenStore.open(tmp_path / "swapped").fingerprint()


def test_the_fingerprint_of_a_store_without_checksums_is_that_of_its_files(store: Path) -> None:
    edit_header(store)
    before = TokenStore.open(store).fingerprint()
    assert TokenStore.open(store).fingerprint() == before
    time = (store / "train.bin").stat().st_mtime_ns
    os.utime(store / "train.bin", ns=(time, time + 1))
    assert TokenStore.open(store).fingerprint() != before


def test_a_damaged_row_is_named(store: Path) -> None:
    file = store / "train.bin"
    data = bytearray(file.read_bytes())
    data[2 * 20 + 5] ^= 16
    file.write_bytes(data)
    rows = TokenStore.open(store).split("train")
    assert rows[1][0]["text"] == sample("train", 1)[0]  # type: ignore[index]
    with pytest.raises(UserError, match=r"train\.bin: row 2 is damaged, its checksum is wrong; copy the token store"):
        rows[2]


def test_a_store_that_shrinks_or_vanishes_while_it_is_read(store: Path) -> None:
    rows = TokenStore.open(store).split("train")
    assert rows[0]
    os.truncate(store / "train.bin", 45)
    with pytest.raises(UserError, match=r"train\.bin has become shorter: row 5 is missing"):
        rows[5]
    (store / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train\.bin does not exist; copy the token store again"):
        pickle.loads(pickle.dumps(rows))[0]


def test_a_store_without_checksums_is_gone_on_with(tmp_path: Path, store: Path) -> None:
    """One that an earlier version began."""
    folder = tmp_path / "begun"
    TokenStoreWriter(folder, **SETTINGS)
    edit_header(folder)
    for name in SETTINGS["splits"]:
        (folder / f"{name}.crc32").unlink()
    tokenize(folder)
    assert not TokenStore.open(folder).header.checksums
    assert [file.name for file in folder.glob("*.crc32")] == []
    assert (folder / "train.bin").read_bytes() == (store / "train.bin").read_bytes()
