"""The two forms of PyTorch files byte by byte: where storages lie, which records count, and limits to the byte."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from cogview_pl.checkpoints.safe_pickle.allowed import Malformed
from cogview_pl.checkpoints.safe_pickle.archives import read_contents

from ..hostile import archive, pickled, several, storage, tensor, text

PICKLE = pickled(tensor((4,), (1,)))


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for record, data in records.items():
            file.writestr(record, data)
    return stream.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.pt"


@pytest.mark.parametrize("zipped", [True, False])
def test_storages_lie_where_torch_has_written_them(file: Path, zipped: bool) -> None:
    value = {"a": torch.arange(5), "b": torch.rand(3).half(), "c": torch.rand(2, 2).double(), "d": torch.rand(7)}
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    contents, data = read_contents(file, verify=True), file.read_bytes()
    assert contents.has_checksums is zipped and isinstance(contents.value, dict) and len(contents.records) == 4
    for name, saved in value.items():
        start, nbytes = contents.records[contents.value[name].storage.key]
        assert data[start : start + nbytes] == saved.numpy().tobytes(), name


def test_records_that_are_no_storages_and_no_pickle(file: Path) -> None:
    """A file may hold more (code of TorchScript, versions): it is neither read nor in the way."""
    others = {"model/data.pkl/x": b"", "model/code/data.pkl": b"?", "model/constants.pkl": b"?", "data.pkl": b"?"}
    storages = {"model/data/0": bytes(16), "model/data/a/b": b"12", "model/database/7": b"", "other/data/8": b""}
    file.write_bytes(zipped({**others, "model/data.pkl": PICKLE, **storages}))
    contents = read_contents(file, verify=True)
    assert {key: nbytes for key, (_, nbytes) in contents.records.items()} == {"0": 16, "a/b": 2}


def test_something_before_the_archive(file: Path) -> None:
    """The end of a file decides what it is, as for any zip archive: here it starts like one of the old form."""
    old = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    file.write_bytes(old + archive(PICKLE, {"0": b"abcd" * 4}))
    contents = read_contents(file, verify=True)
    start, nbytes = contents.records["0"]
    assert file.read_bytes()[start : start + nbytes] == b"abcd" * 4 and contents.has_checksums


@pytest.mark.parametrize(("order", "fits"), [(b"little", True), (b"big", False), (None, True)])
def test_byte_order_of_archives(file: Path, order: bytes | None, fits: bool) -> None:
    records = {"a/data.pkl": PICKLE, "b/byteorder": b"big", "a/data/0": bytes(16)}
    file.write_bytes(zipped(records | ({"a/byteorder": order} if order else {})))
    if fits:
        assert list(read_contents(file, verify=True).records) == ["0"]
    else:
        with pytest.raises(Malformed, match="byte order of another kind of machine"):
            read_contents(file, verify=True)


def with_text(length: int) -> bytes:
    """A pickle of so many bytes."""
    return pickled(text("x" * (length - len(pickled(text(""))))))


def test_the_longest_pickle(file: Path) -> None:
    file.write_bytes(zipped({"a/data.pkl": with_text(4 << 20)}))
    value = read_contents(file, verify=True).value
    assert isinstance(value, dict) and len(value["a"]) > 4_000_000
    file.write_bytes(zipped({"a/data.pkl": with_text((4 << 20) + 1)}))
    with pytest.raises(Malformed, match="a pickle that is too long"):
        read_contents(file, verify=True)


@pytest.mark.parametrize(("size", "error"), [(16 << 20, zipfile.BadZipFile), ((16 << 20) + 1, Malformed)])
def test_the_longest_directory(file: Path, size: int, error: type[Exception]) -> None:
    """A directory of zeros, which is none, is not even read where it is longer."""
    with file.open("wb") as stream:
        stream.truncate(size)
    with file.open("ab") as stream:
        stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(error) as caught:
        read_contents(file, verify=True)
    assert (str(caught.value) == f"a directory of {size} bytes") == (error is Malformed)


def test_records_that_fill_the_file_and_more(file: Path) -> None:
    whole = archive(PICKLE, {"0": bytes(16)})
    at = whole.rindex(b"PK\1\2")  # the last record, whose length is the directory's word
    sizes = at + 20
    rest = len(whole) - sum(record.file_size for record in zipfile.ZipFile(io.BytesIO(whole)).infolist()[:-1])
    for length in (rest, rest + 1):  # all records together are as long as the file, or longer
        size = struct.pack("<L", length)
        file.write_bytes(whole[:sizes] + size + size + whole[sizes + 8 :])
        with pytest.raises((Malformed, zipfile.BadZipFile, EOFError)) as error:
            read_contents(file, verify=True)
        assert (str(error.value) == "records that overlap") == (length > rest)


def test_compressed_records(file: Path) -> None:
    file.write_bytes(zipped({"a/data.pkl": PICKLE * 10}, zipfile.ZIP_DEFLATED))
    with pytest.raises(Malformed, match=r"a compressed record a/data\.pkl"):
        read_contents(file, verify=True)
    whole = bytearray(archive(PICKLE, {"0": bytes(16)}))
    at = whole.rindex(b"PK\1\2")
    whole[at + 20] = 15  # of 16 bytes, and not compressed by the directory's word
    file.write_bytes(whole)
    with pytest.raises(Malformed, match="a compressed record archive/data/0"):
        read_contents(file, verify=False)


@pytest.mark.parametrize("length", [0, 3, 21, 22, 23])
def test_files_too_short_for_anything(file: Path, length: int) -> None:
    file.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."[:length])
    with pytest.raises(Exception, match=r"\w"):
        read_contents(file, verify=True)


MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def old_file(
    *, version: object = 1001, system: object = SYSTEM, value: bytes = PICKLE, keys: object = ("0",), data: bytes = b""
) -> bytes:
    """A file as torch wrote it before version 1.6."""
    plain = [pickle.dumps(part, protocol=2) for part in (version, system)]
    listed = list(keys) if isinstance(keys, tuple) else keys
    return MAGIC + b"".join(plain) + value + pickle.dumps(listed, protocol=2) + data


FOUR, TWO = struct.pack("<q", 4) + b"abcd" * 4, struct.pack("<q", 2) + b"efgh" * 4
PAIR = pickled(several(tensor((4,), (1,)), storage(2, "k" * 30, "LongStorage")))


def test_an_old_file_of_two_storages(file: Path) -> None:
    for keys, data in ((("0", "k" * 30), FOUR + TWO), (("k" * 30, "0"), TWO + FOUR)):
        content = old_file(value=PAIR, keys=keys, data=data)
        file.write_bytes(content)
        contents = read_contents(file, verify=True)
        assert list(contents.records) == list(keys) and not contents.has_checksums
        found = {key: content[start : start + nbytes] for key, (start, nbytes) in contents.records.items()}
        assert found == {"0": b"abcd" * 4, "k" * 30: b"efgh" * 4}


OLD = {
    "version before": (old_file(version=1000), "another version of the old format"),
    "version after": (old_file(version=1002), "another version of the old format"),
    "big-endian": (old_file(system=SYSTEM | {"little_endian": False}), "numbers in the byte order of another"),
    "no byte order": (old_file(system={}), "numbers in the byte order of another"),
    "a byte order of text": (
        old_file(system=SYSTEM | {"little_endian": "yes"}),
        "numbers in the byte order of another",
    ),
    "system as a list": (old_file(system=[True]), "numbers in the byte order of another"),
    "keys as a dictionary": (old_file(keys={"0": 1}), "a list of storages that are not those of its tensors"),
    "keys that are numbers": (old_file(keys=(0,)), "a list of storages that are not those of its tensors"),
    "more keys": (old_file(keys=("0", "1")), "a list of storages that are not those of its tensors"),
    "no keys": (old_file(keys=()), "a list of storages that are not those of its tensors"),
    "other key": (old_file(keys=("1",)), "a list of storages that are not those of its tensors"),
    "shorter": (old_file(data=struct.pack("<q", 3) + bytes(16)), "storage 0 of another length"),
    "longer": (old_file(data=struct.pack("<q", 5) + bytes(32)), "storage 0 of another length"),
    "long key": (
        old_file(value=PAIR, keys=("0", "k" * 30), data=FOUR + FOUR),
        f"storage {'k' * 20} of another length",
    ),
}


@pytest.mark.parametrize("title", OLD)
def test_old_files_that_are_refused(file: Path, title: str) -> None:
    content, words = OLD[title]
    file.write_bytes(content)
    with pytest.raises(Malformed, match=f"^{words}"):
        read_contents(file, verify=True)
