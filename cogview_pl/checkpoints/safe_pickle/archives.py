"""The two forms of PyTorch files: a zip archive with checksums, and the form of torch before 1.6, without checksums.

NAME/data.pkl, NAME/data/KEY, NAME/byteorder, …    zip; no record is compressed
magic number, version, system, value, keys         old: five pickles, then for each key its length and its numbers
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cogview_pl.checkpoints.safe_pickle.allowed import Malformed, Value
from cogview_pl.checkpoints.safe_pickle.opcodes import read_pickle

_MAX_PICKLE = 4 << 20  # the pickle of the released transformer of 4 billion weights has about 200 kB
_CHUNK = 16 << 20

_END_RECORD = b"PK\x05\x06"
_END_RECORD_SIZE = 22
_LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of name and extra field; these and the data follow

_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that starts old files, as a pickle
_OLD_VERSION = 1001


@dataclass(frozen=True)
class Contents:
    """Content of a file without its numbers."""

    value: Value
    """Value of the pickle, with `Storage` and `View` instead of tensors."""
    records: dict[str, tuple[int, int]]
    """Key of a storage → offset of its bytes in the file, and their number."""
    has_checksums: bool


def read_contents(file: Path, *, verify: bool) -> Contents:
    """Read the pickle of a file and find its storages; no single read is larger than a few megabytes.

    Args:
        file: a file that exists.
        verify: compare the checksums of all records; it reads the file once.

    Raises:
        Exception: the file is damaged, hostile, or no PyTorch file.
    """
    with _Stream(io.FileIO(file)) as stream:
        start = stream.read(len(_OLD_MAGIC))
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - _END_RECORD_SIZE))
        ends_as_zip = stream.read(len(_END_RECORD)) == _END_RECORD
        stream.seek(0)
        if start == _OLD_MAGIC and not ends_as_zip:
            return _read_old(stream)
        return _read_zip(stream, size, verify)


class _Stream(io.BufferedReader):
    """Refuses large reads: the file itself states the size of its directory, and zipfile would read all of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _CHUNK:
            raise Malformed(f"a directory of {size} bytes")
        return super().read(size)


def _read_zip(stream: _Stream, size: int, verify: bool) -> Contents:
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) != len(records):
            raise Malformed("two records of one name")
        if sum(record.compress_size for record in records) > size:
            raise Malformed("records that overlap")
        found = {record.filename: _locate(archive, stream, record, verify) for record in records}
        pickles = [name for name in found if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Malformed(f"{len(pickles)} records data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        if found[pickles[0]][1] > _MAX_PICKLE:
            raise Malformed("a pickle that is too long")
        if f"{folder}byteorder" in found and archive.read(f"{folder}byteorder") != sys.byteorder.encode():
            raise Malformed("numbers in the byte order of another kind of machine")
        value, _ = read_pickle(io.BytesIO(archive.read(pickles[0])))
    prefix = f"{folder}data/"
    places = {name.removeprefix(prefix): place for name, place in found.items() if name.startswith(prefix)}
    return Contents(value, places, has_checksums=True)


def _locate(archive: zipfile.ZipFile, stream: _Stream, record: zipfile.ZipInfo, verify: bool) -> tuple[int, int]:
    """Offset of a record's bytes in the file, and their number; with `verify`, compares the checksum."""
    if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
        raise Malformed(f"a compressed record {record.filename}")
    with archive.open(record) as data:  # compares the directory with the record's own header
        while verify and data.read(_CHUNK):
            pass  # zipfile compares the checksum at the end
    stream.seek(record.header_offset)
    start = record.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size)))
    return start, record.file_size


def _read_old(stream: _Stream) -> Contents:
    head = io.BytesIO(stream.read(_MAX_PICKLE))
    read_pickle(head)  # the magic number
    version, system = read_pickle(head)[0], read_pickle(head)[0]
    if version != _OLD_VERSION:
        raise Malformed("another version of the old format")
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise Malformed("numbers in the byte order of another kind of machine")
    value, storages = read_pickle(head)
    keys, _ = read_pickle(head)
    place = head.tell()
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise Malformed("a list of storages that are not those of its tensors")
    records = {}
    for key in keys:
        stream.seek(place)
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != storages[key].numel:
            raise Malformed(f"storage {key[:20]} of another length")
        records[key] = (place + 8, storages[key].nbytes)
        place += 8 + storages[key].nbytes
    return Contents(value, records, has_checksums=False)
