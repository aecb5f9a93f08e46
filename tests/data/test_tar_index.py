"""Members of tar files: where they are, as Python's tarfile finds them, and what hostile or damaged files come to."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from cogview_pl.data.decoding.formats import IMAGE_EXTENSIONS
from cogview_pl.data.shards.table import read_shard
from cogview_pl.data.shards.tar_headers import SPARSE_MEMBER, Span
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS, Stopped

GIB = 2**30


def header(name: str, size: int | bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytearray:
    """A header with a right checksum; a size may be given as it is on disk."""
    block = bytearray(512)
    block[:100] = name.encode().ljust(100, b"\0")
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = magic
    return signed(block)


def signed(block: bytearray) -> bytearray:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return block


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return bytes(header(name, len(data), kind)) + data + bytes(-len(data) % 512)


def records(**values: str) -> bytes:
    """A pax header with these records."""
    found = b""
    for key, value in values.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        sizes = range(len(rest), len(rest) + 9)
        found += next(b"%d" % size + rest for size in sizes if len(b"%d" % size + rest) == size)
    return member("pax", found, b"x")


END = bytes(1024)


def write(path: Path, *parts: bytes | bytearray, size: int = 0) -> Path:
    """A file of parts, and holes up to a size."""
    with path.open("wb") as stream:
        stream.write(b"".join(parts))
        if size:
            stream.truncate(size)
    return path


def index_shard(path: Path) -> dict[str, dict[str, Span]]:
    """The places of members by key and extension."""
    table = read_shard(path, IMAGE_EXTENSIONS)
    return {table.keys[sample]: table.members(sample) for sample in range(len(table.keys))}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        index_shard(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def as_tarfile_finds(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for found in tar:
            folder, slash, base = found.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if found.isfile() and stem and dot:
                samples.setdefault(folder + slash + stem, {})[extension.lower()] = (found.offset_data, found.size)
    return samples


# --- what is usual


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_finds_what_tarfile_finds(tmp_path: Path, form: int) -> None:
    random_ = random.Random(form)
    kinds = [tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CONTTYPE, b"V", b"D"]
    for number in range(40):
        file = tmp_path / f"{number}.tar"
        with tarfile.open(file, "w", format=form) as tar:
            for _ in range(random_.randrange(1, 10)):
                folders = "/".join(random_.choice(("a", "样本", "b.c", "")) for _ in range(random_.randrange(8)))
                long = "长" * random_.randrange(200) if form != tarfile.USTAR_FORMAT else ""
                info = tarfile.TarInfo(f"{folders}{long}/k{random_.randrange(4)}.{random_.choice(('png', 'JSON', ''))}")
                info.type = random_.choice(kinds)
                info.linkname = "there"
                info.mtime = random_.choice((0, 1.5))
                data = random_.randbytes(random_.choice((0, 1, 511, 512, 513)))
                info.size = 0 if info.type in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE) else len(data)
                tar.addfile(info, io.BytesIO(data))
        assert index_shard(file) == as_tarfile_finds(file)


def test_old_forms(tmp_path: Path) -> None:
    v7 = header("folder/", 0, b"\0", bytes(8)) + header("folder/a.png", 3, b"\0", bytes(8)) + b"abc" + bytes(509)
    by_signed_bytes = header("样.png", 0)
    by_signed_bytes[148:156] = b"%06o\0 " % (sum(by_signed_bytes[:148] + by_signed_bytes[156:]) + 256 - 3 * 256)
    long_prefix = header("b.png", 0)
    long_prefix[345:348] = b"pre"
    file = write(tmp_path / "a.tar", v7, by_signed_bytes, signed(long_prefix), END)
    assert index_shard(file) == as_tarfile_finds(file)
    assert index_shard(file) == {
        "folder/a": {"png": Span(1024, 3)},
        "样": {"png": Span(2048, 0)},
        "pre/b": {"png": Span(2560, 0)},
    }


def test_a_size_may_be_in_base_256_or_in_a_pax_header(tmp_path: Path) -> None:
    binary = header("a.png", b"\x80" + (5).to_bytes(11, "big")) + b"12345" + bytes(507)
    file = write(tmp_path / "a.tar", binary, records(size="4"), header("b.png", 0), b"1234" + bytes(508), END)
    assert index_shard(file) == {"a": {"png": Span(512, 5)}, "b": {"png": Span(2560, 4)}}


def test_a_tar_of_nothing_has_no_members(tmp_path: Path) -> None:
    assert index_shard(write(tmp_path / "a.tar", END)) == {}
    assert index_shard(write(tmp_path / "b.tar", size=2**40)) == {}  # a hole of a terabyte


def test_members_without_a_key_or_an_extension_are_left_out(tmp_path: Path) -> None:
    names = ["README", ".hidden.png", "a/.x", "a.b/README", "a.b/c.TAR.gz", "k.", "x/k.png"]
    file = write(tmp_path / "a.tar", *(member(name, b"1") for name in names), END)
    assert index_shard(file) == {
        "a.b/c": {"TAR.gz": Span(4 * 1024 + 512, 1)},
        "k": {"": Span(5 * 1024 + 512, 1)},
        "x/k": {"png": Span(6 * 1024 + 512, 1)},
    }


# --- sparse members


def test_sparse_members_are_marked(tmp_path: Path) -> None:
    """In the two forms that GNU tar writes; what comes behind them is found."""
    gnu = header("a.png", 512, b"S")
    gnu[482] = 1
    places = bytearray(512)
    places[504] = 1
    pax = records(GNU__sparse__major="1", GNU__sparse__name="dir/b.png")
    file = write(
        tmp_path / "a.tar",
        signed(gnu), places, bytes(512), b"x" * 512,
        pax, header("GNUSparseFile.0/b.png", 512), bytes(512),
        member("c.png", b"whole"), END,
    )  # fmt: skip
    assert index_shard(file) == {
        "a": {"png": SPARSE_MEMBER},
        "dir/b": {"png": SPARSE_MEMBER},
        "c": {"png": Span(4096 + 512, 5)},
    }


# --- hostile ones


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (b"\x80" + (10**12).to_bytes(11, "big"), "a member of 1,000,000,000,000 bytes goes beyond the end of the file"),
        (b"\x80" + b"\xff" * 11, r"a member of [\d,]+ bytes goes beyond the end of the file"),
        (b"777777777777", "a member of 68,719,476,735 bytes goes beyond the end of the file"),
        (b"\xff" * 12, "a number that cannot be read"),
        (b"-0000000512\0", "a number that cannot be read"),
        (b"0000008\0\0\0\0\0", "a number that cannot be read"),
        (b"\x90" + bytes(11), "a number that cannot be read"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, size: bytes, reason: str) -> None:
    first = refused(write(tmp_path / "a.tar", header("a.png", size), END))
    assert "a.tar is not an uncompressed tar file or is cut off (" in first
    later = refused(write(tmp_path / "b.tar", member("a.png", b"1"), header("b.png", size), END))
    assert "b.tar is cut off or damaged at byte 1024 (1 samples before it): " in later
    assert re.search(reason, first) and re.search(reason, later)


@pytest.mark.parametrize("size", ["-512", "1e3", "٣", "9" * 30, "", "99999999999999999999"])
def test_a_size_in_a_pax_header_that_cannot_be_is_refused(tmp_path: Path, size: str) -> None:
    file = write(tmp_path / "a.tar", member("a.png", b"1"), records(size=size), header("b.png", 0), END)
    assert "damaged at byte" in refused(file)


@pytest.mark.parametrize(("kind", "limit"), [(b"L", "65,536"), (b"x", "1,048,576"), (b"X", "1,048,576")])
def test_names_and_pax_headers_of_gigabytes_are_not_read(tmp_path: Path, kind: bytes, limit: str) -> None:
    start = [member("a.png", b"1"), header("long", GIB, kind)]
    file = write(tmp_path / "a.tar", *start, size=1536 + GIB + 2048)
    tracemalloc.start()
    message = refused(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"a name or a pax header of 1,073,741,824 bytes, at most {limit} are read" in message
    assert peak < 2**20


@pytest.mark.parametrize("kind", [b"K", b"g"])
def test_what_says_nothing_of_a_member_is_passed_over_however_large(tmp_path: Path, kind: bytes) -> None:
    file = tmp_path / "a.tar"
    write(file, header("link", GIB, kind), size=512 + GIB)
    with file.open("ab") as stream:
        stream.write(member("a.png", b"1") + END)
    assert index_shard(file) == {"a": {"png": Span(1024 + GIB, 1)}}


def test_a_chain_of_headers_needs_no_stack(tmp_path: Path) -> None:
    """The first one counts, as with tarfile, which gives up after a few hundred."""
    chain = [member("long", f"name{number}.png\0".encode(), b"L") for number in range(5000)]
    assert index_shard(write(tmp_path / "a.tar", *chain, member("x.png", b"1"), END)) == {
        "name0": {"png": Span(5001 * 1024 - 512, 1)}
    }
    assert "damaged at byte 5120000 (0 samples before it): no header" in refused(write(tmp_path / "b.tar", *chain, END))


@pytest.mark.parametrize(
    "content", [b"9" * 2**20, b"1 path=a\n", b"99 path=a\n", b"path=a\n", b" 9 path=a\n", b"9 path:aa\n", b"0 path=a\n"]
)
def test_pax_headers_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path / "a.tar", member("a.png", b"1"), member("pax", content, b"x"), member("b.png", b""), END)
    assert "damaged at byte 1024 (1 samples before it): a pax header that cannot be read" in refused(file)


def test_the_last_member_must_be_within_the_file(tmp_path: Path) -> None:
    whole = member("a.png", b"1") + member("b.png", b"2" * 1000)
    assert "damaged at byte 1024 (1 samples before it): a member of 1,000 bytes goes beyond" in refused(
        write(tmp_path / "a.tar", whole[:-300])
    )
    assert "damaged at byte 2560 (2 samples before it): the file ends early" in refused(
        write(tmp_path / "b.tar", whole)
    )


def test_holes_without_end_end_with_the_file(tmp_path: Path) -> None:
    gnu = header("a.png", 0, b"S")
    gnu[482] = 1
    assert "is cut off (the file ends early)" in refused(write(tmp_path / "a.tar", signed(gnu), b"\1" * 512 * 100))


def test_random_damage_ends_in_a_result_or_in_one_line(tmp_path: Path) -> None:
    random_ = random.Random(0)
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{'长' * 60}{number}.png")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    whole = file.read_bytes()
    results = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random_.randrange(1, 5)):
            data[random_.randrange(len(data))] = random_.randrange(256)
        for at in range(0, len(data), 512):  # damage that the checksum does not tell
            if data[at + 257 : at + 262] == b"ustar":
                data[at : at + 512] = signed(data[at : at + 512])
        file.write_bytes(data)
        try:
            for parts in index_shard(file).values():
                assert all(place == SPARSE_MEMBER or place.offset + place.size <= len(data) for place in parts.values())
            results += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 50 < results < 300


# --- what is no file


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "a.tar is a named pipe, not a file; give a tar file, or leave it out of data.urls" in refused(
        tmp_path / "a.tar"
    )
    assert "is a folder, not a file" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "none.tar")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose beginning no one can read")
def test_a_file_that_the_system_does_not_read_is_named() -> None:
    message = refused(Path("/proc/self/mem"))
    assert message == ("/proc/self/mem cannot be read (Input/output error); see to it, or leave it out of data.urls")


def test_a_name_may_have_as_many_bytes_as_is_read_and_no_more(tmp_path: Path) -> None:
    for size in (2**16, 2**16 + 1):
        name = b"n" * (size - 4) + b".png"
        file = write(tmp_path / "a.tar", member("long", name, b"L"), member("x.png", b"1"), END)
        if size == 2**16:
            assert list(index_shard(file)) == ["n" * (size - 4)]
        else:
            assert "a name or a pax header of 65,537 bytes, at most 65,536 are read" in refused(file)
    by_pax = write(tmp_path / "b.tar", records(path="n" * 2**16 + ".png"), member("x.png", b"1"), END)
    assert "(0 samples before it): a name or a pax header of 65,540 bytes, at most 65,536 are read" in refused(by_pax)


def test_a_pax_header_may_have_as_many_bytes_as_are_read_and_no_more(tmp_path: Path) -> None:
    for size in (2**20, 2**20 + 1):
        record = b"comment=" + b"c" * (size - 17) + b"\n"
        content = b"%d " % size + record
        assert len(content) == size
        file = write(tmp_path / "a.tar", member("pax", content, b"x"), member("x.png", b"1"), END)
        if size == 2**20:
            assert list(index_shard(file)) == ["x"]
        else:
            assert "a name or a pax header of 1,048,577 bytes, at most 1,048,576 are read" in refused(file)


def test_a_name_of_gnu_counts_over_one_of_pax_and_the_outer_over_the_inner(tmp_path: Path) -> None:
    long, pax = member("long", b"gnu.png\0", b"L"), records(path="pax.png")
    inner = records(path="inner.png", size="3")
    for parts, expected in (((long, pax), "gnu"), ((pax, long), "pax"), ((pax, inner), "pax"), ((inner, pax), "inner")):
        file = write(tmp_path / "a.tar", *parts, member("x.png", b"123"), member("y.png", b""), END)
        assert list(index_shard(file)) == [expected, "y"]  # and nothing is left for the next


def test_a_name_of_a_sparse_member_counts_over_its_path(tmp_path: Path) -> None:
    both = records(path="path.png", GNU__sparse__name="sparse.png")
    file = write(tmp_path / "a.tar", both, member("x.png", b"1"), records(path="b.png"), member("y.png", b"2"), END)
    assert index_shard(file) == {"sparse": {"png": SPARSE_MEMBER}, "b": {"png": Span(3 * 1024 + 512, 1)}}


def test_links_and_folders_have_no_data_whatever_size_they_say(tmp_path: Path) -> None:
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        odd = [header("link.png", 700, kind), records(size="900"), header("more.png", 700, kind)]
        file = write(tmp_path / "a.tar", *odd, member("a.png", b"1"), END)
        assert index_shard(file) == {"a": {"png": Span(512 + 1024 + 512 + 512, 1)}}


def test_a_member_of_an_unknown_kind_is_passed_over_with_its_data(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", member("volume", b"1" * 600, b"V"), member("a.png", b"1", b"7"), END)
    assert index_shard(file) == {"a": {"png": Span(512 + 1024 + 512, 1)}}


def test_of_two_members_with_one_name_the_later_counts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tar", member("a.png", b"1"), member("b.png", b"2"), member("a.PNG", b"33"), END)
    assert index_shard(file) == {"a": {"png": Span(2 * 1024 + 512, 2)}, "b": {"png": Span(1024 + 512, 1)}}
    assert list(index_shard(file)) == ["a", "b"]


def test_the_holes_of_a_sparse_member_may_fill_several_blocks(tmp_path: Path) -> None:
    gnu = header("a.png", 512, b"S")
    gnu[482] = 1
    more, last = bytearray(512), bytearray(512)
    more[504] = 1
    last[503] = last[505] = 1  # beside the sign
    file = write(tmp_path / "a.tar", signed(gnu), more, last, b"x" * 512, member("b.png", b"1"), END)
    assert index_shard(file) == {"a": {"png": SPARSE_MEMBER}, "b": {"png": Span(5 * 512, 1)}}


def test_a_stop_that_is_asked_for_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.tar", member("a.png", b"1"), END)
    with monkeypatch.context() as asked, pytest.raises(Stopped):
        asked.setattr(SIGNALS, "received", signal.SIGTERM)
        index_shard(file)


def test_the_checksum_of_many_high_bytes_has_all_its_digits(tmp_path: Path) -> None:
    block = header("x.png", 0)
    block[345:500] = b"\xff" * 155
    assert sum(signed(block)) > 0o100000
    assert list(index_shard(write(tmp_path / "a.tar", block, END))) == ["\udcff" * 155 + "/x"]


def test_many_headers_are_read_as_few_are(tmp_path: Path) -> None:
    """Over the ends of batches, with other headers among the usual ones."""
    random_ = random.Random(0)
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(2300):
            info = tarfile.TarInfo(f"{'样' if number % 700 == 0 else 'k'}{number}.{random_.choice(('png', 'JPG'))}")
            info.mtime = random_.choice((0, 1.5))
            info.type = tarfile.DIRTYPE if number % 900 == 0 else tarfile.REGTYPE
            info.size = 0 if info.isdir() else random_.choice((0, 1, 512, 513))
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    found = index_shard(file)
    assert found == as_tarfile_finds(file) and len(found) > 2290
    whole = file.read_bytes()
    for number in (0, 2047, 2048):
        key = list(found)[number]
        at = next(iter(found[key].values())).offset - 512
        file.write_bytes(whole[: at + 1] + bytes([whole[at + 1] ^ 1]) + whole[at + 2 :])
        message = refused(file)
        if number == 0:
            assert "a.tar is not an uncompressed tar file" in message or f"byte {at} (0 samples before it)" in message
        else:
            assert f"damaged at byte {at} ({number:,} samples before it): no header with a right checksum" in message
