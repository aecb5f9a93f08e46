"""Damaged `.pt` files and archives that torch does not write: each ends in a result or in one line."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogview_pl.checkpoints.model_folder import build_vqvae
from cogview_pl.checkpoints.released import released_settings, save_transformer, save_vqvae
from cogview_pl.checkpoints.safe_pickle.load import read_pt
from cogview_pl.errors import UserError
from tests.make_models import make_transformer

from ..hostile import (
    doubled,
    number,
    pickled,
    several,
    tensor,
    text,
)
from .values import assert_equal, contents


def released_transformer(folder: Path) -> Path:
    sizes = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "num_positions": 8}
    save_transformer(make_transformer(vocab_size=64, **sizes), folder)
    return folder / "1" / "mp_rank_00_model_states.pt"


def released_tokenizer(folder: Path) -> Path:
    save_vqvae(build_vqvae(released_settings(8, 4, 16)), folder / "tokenizer.pt")
    return folder / "tokenizer.pt"


WRITERS = [released_transformer, released_tokenizer]


@pytest.mark.parametrize("write", WRITERS)
def test_flipped_bits_are_not_believed(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    torch.manual_seed(0)
    file = write(tmp_path)
    whole = file.read_bytes()
    (tmp_path / "whole.pt").write_bytes(whole)
    wanted = read_pt(tmp_path / "whole.pt", "key")
    flips = random.Random(0).sample(range(8 * len(whole)), 100)
    refused = 0
    for flip in flips:
        damaged = bytearray(whole)
        damaged[flip // 8] ^= 1 << flip % 8
        file.write_bytes(damaged)
        try:
            assert_equal(read_pt(file, "key"), wanted)
        except UserError as error:
            assert str(error).startswith("key: ") and file.name in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50  # most bits are weights


@pytest.mark.parametrize("write", WRITERS)
def test_flips_around_the_records(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """Headers, padding and directory have no checksums: whatever is read must be right all the same."""
    torch.manual_seed(0)
    file = write(tmp_path)
    whole = file.read_bytes()
    (tmp_path / "whole.pt").write_bytes(whole)
    wanted = read_pt(tmp_path / "whole.pt", "key")
    headers = [at for at in range(len(whole)) if whole[at : at + 2] == b"PK"]
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[min(rng.choice(headers) + rng.randrange(80), len(whole) - 1)] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            assert_equal(read_pt(file, "key"), wanted)
        except UserError as error:
            assert str(error).startswith("key: ") and "\n" not in str(error)


def test_checksums_can_be_left_out(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "file.pt")
    damaged = bytearray((tmp_path / "file.pt").read_bytes())
    damaged[damaged.index(bytes(4000)) + 2000] ^= 1
    (tmp_path / "file.pt").write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged.*CRC"):
        read_pt(tmp_path / "file.pt", "key")
    assert read_pt(tmp_path / "file.pt", "key", verify=False)["a"].count_nonzero() == 1


def flip_start(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def compressed(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    return stream.getvalue()


def other_machine(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        names = [record for record in opened.namelist() if "byteorder" not in record]
        parts = {record: opened.read(record) for record in names}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as new:
        for record, part in {**parts, f"{names[0].split('/')[0]}/byteorder": b"big"}.items():
            new.writestr(record, part)
    return stream.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut at the end": lambda data: data[:-30],
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at the start": lambda data: data[100:],
    "first letter": flip_start,
    "no end record": lambda data: data[:-22] + bytes(22),
    "empty": lambda data: b"",
    "text": lambda data: b"<html>404</html>" * 100,
    "compressed": compressed,
    "other machine": other_machine,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    whole = released_tokenizer(tmp_path).read_bytes()
    (tmp_path / "file.pt").write_bytes(DAMAGE[damage](whole))
    for verify in (True, False):
        with pytest.raises(UserError, match=r"key: .*file.pt is damaged or no PyTorch file \(.+\); download it again"):
            read_pt(tmp_path / "file.pt", "key", verify=verify)


def written(*records: tuple[str, bytes, int]) -> bytes:
    """An archive of records: name, content, and zipfile's number of how they are compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for record, data, compression in records:
            file.writestr(zipfile.ZipInfo(record), data, compression)
    return stream.getvalue()


PICKLE = ("archive/data.pkl", pickled(tensor((4,), (1,))), zipfile.ZIP_STORED)


def overlapping() -> bytes:
    """A record that holds another one."""
    inner, data = zipfile.ZipInfo("archive/data/1"), bytes(1 << 16)
    inner.file_size, inner.compress_size, inner.CRC = len(data), len(data), zlib.crc32(data)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(*PICKLE[:2])
        file.writestr("archive/data/0", inner.FileHeader() + data)
        inner.header_offset = stream.tell() - len(data) - len(inner.FileHeader())
        file.filelist.append(inner)
    return stream.getvalue()


def compressed_to_its_length() -> bytes:
    """A record whose compressed bytes are as many as its own."""
    for length in range(4, 40, 4):
        for period in range(1, 9):
            data = bytes(at % period for at in range(length))
            content = written(PICKLE, ("archive/data/0", data, zipfile.ZIP_DEFLATED))
            record = zipfile.ZipFile(io.BytesIO(content)).getinfo("archive/data/0")
            if record.compress_size == length:
                return content
    raise AssertionError("no such record was found")


def twice(record: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return written(PICKLE, (record, *PICKLE[1:]))


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "overlapping": (overlapping, "verlap"),
    "compressed to its length": (compressed_to_its_length, "compressed record archive/data/0"),
    "two of one name": (lambda: twice(PICKLE[0]), "two records of one name"),
    "two pickles": (lambda: twice("other/data.pkl"), "2 records data.pkl"),
    "no pickle": (lambda: written(("archive/version", b"3", zipfile.ZIP_STORED)), "0 records data.pkl"),
    "large directory": (
        lambda: bytes(20 << 20) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 20 << 20, 0, 0),
        f"a directory of {20 << 20} bytes",
    ),
}


@pytest.mark.parametrize("title", ARCHIVES)
def test_archives_that_torch_does_not_write(tmp_path: Path, title: str) -> None:
    write, words = ARCHIVES[title]
    (tmp_path / "file.pt").write_bytes(write())
    for verify in (True, False):
        with pytest.raises(UserError, match=f"file.pt is damaged or no PyTorch file .*{words}"):
            read_pt(tmp_path / "file.pt", "key", verify=verify)


OLD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "version": (lambda data: data.replace(b"M\xe9\x03", b"M\xe8\x03", 1), "another version"),
    "byte order": (lambda data: data.replace(b"\x88", b"\x89", 1), "byte order"),
    "length": (lambda data: data[:-32] + bytes([9]) + data[-31:], "of another length"),
    "cut": (lambda data: data[:-4], "no 24 bytes of storage"),
    "cut before the length": (lambda data: data[:-30], "buffer of 8 bytes"),
    "end of an archive": (lambda data: data + b"PK\5\6" + bytes(18), "0 records data.pkl"),
}


@pytest.mark.parametrize("change", OLD)
def test_old_files_that_torch_does_not_write(tmp_path: Path, change: str) -> None:
    edit, words = OLD[change]
    torch.save({"a": torch.arange(3)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "file.pt").write_bytes(edit((tmp_path / "file.pt").read_bytes()))
    with pytest.raises(UserError, match=f"file.pt is damaged or no PyTorch file .*{words}"):
        read_pt(tmp_path / "file.pt", "key")


def test_old_files_end_in_a_result_or_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save(contents(), file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged[: rng.choice([len(whole), rng.randrange(len(whole))])])
        try:
            assert isinstance(read_pt(file, "key"), dict)
        except UserError as error:
            assert str(error).startswith("key: ") and "\n" not in str(error)


def test_code_in_old_files(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/was_here",)

    torch.save({"a": Hostile()}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"refused.*system"):
        read_pt(tmp_path / "file.pt", "key")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("keys", [several(text("0")), b"]" + doubled(60) + b"a", b"]", b"](" + text("0") * 2 + b"e"])
def test_list_of_storages_in_old_files(tmp_path: Path, keys: bytes) -> None:
    torch.save({}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    start = (tmp_path / "file.pt").read_bytes().removesuffix(b"\x80\x02}q\x00.\x80\x02]q\x00.")
    parts = [pickled(tensor((4,), (1,))), b"\x80\x02" + keys + b".", number(4)[2:].ljust(8, b"\0"), bytes(16)]
    (tmp_path / "file.pt").write_bytes(start + b"".join(parts))
    with pytest.raises(UserError, match="list of storages"):
        read_pt(tmp_path / "file.pt", "key")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for path in ("pipe.pt", "folder.pt", "missing.pt", "x" * 5000 + ".pt", "zero\0.pt"):
        with pytest.raises(UserError, match=r"key: .* does not exist or is no file"):
            read_pt(tmp_path / path, "key")
