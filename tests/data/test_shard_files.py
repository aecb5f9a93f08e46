"""The files that patterns stand for, in which order, and how many of them are open at once."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from cogview_pl.data.shards import files as shard_files
from cogview_pl.data.shards.files import OpenFiles, expand_urls
from cogview_pl.durable.read import UnreadableError
from cogview_pl.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("b.tar", "a.tar", "s/a.tar", "s/t/c.tar", "s/t/note.txt", "set[1].tar", "10.tar", "9.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("{b,a}.tar", "b.tar a.tar"),  # as listed
        ("[ab].tar", "a.tar b.tar"),  # as sorted
        ("**/*.tar", "10.tar 9.tar a.tar b.tar s/a.tar s/t/c.tar set[1].tar"),  # at any depth
        ("s/*", "s/a.tar"),  # passing over the folder
        ("set[1].tar", "set[1].tar"),  # as it is written, if there is such a file
        ("{9..10}.tar", "9.tar 10.tar"),
        ("{10..9}.tar", "10.tar 9.tar"),
        (["b.tar", "?.tar", "s/{a,a}.tar"], "b.tar 9.tar a.tar s/a.tar"),  # each once, at its first place
    ],
)
def test_what_a_pattern_stands_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, patterns: str | list[str], expected: str
) -> None:
    monkeypatch.chdir(root)
    assert [str(file) for file in expand_urls(patterns, "data.urls")] == expected.split()
    monkeypatch.setenv("HOME", str(root))
    at_home = [f"~/{pattern}" for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    assert expand_urls(at_home, "data.urls") == [root / name for name in expected.split()]


@pytest.mark.parametrize("pattern", ["{0..9}.tar", "{9..0}.tar", "{-4..5}.tar", "{5..-4}.tar", "{1..2}{1..5}.tar"])
def test_ranges_are_counted_before_they_are_spelt_out(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard_files.MAX_SHARDS == 1_000_000
    monkeypatch.setattr(shard_files, "MAX_SHARDS", 10)
    with pytest.raises(UserError, match=r"^x=\S+ no file matches"):
        expand_urls(pattern, "x")
    monkeypatch.setattr(shard_files, "MAX_SHARDS", 9)
    with pytest.raises(UserError, match=r"^x=\S+ stands for more than 9 shards; check its ranges$"):
        expand_urls(pattern, "x")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s3://a/b.tar", "is remote"),
        ("gs+x.y-z://a/b.tar", "is remote"),
        ("pipe:cat a.tar", "is remote; download the shards first and give their local path"),
        ("C:/a.tar", r"no file matches C:/a\.tar; check path and range"),  # a drive, not a protocol
        ("a/http://b.tar", "no file matches"),
        ("s/u*", r"no file matches s/u\*; check path and range"),
        ("s/{t}", r"no file matches"),
        ("s/t", r"no file matches s/t; it is a folder, write s/t/\*\.tar"),
        ("s/[t]", r"no file matches s/\[t\]; check path and range"),
        ("{0..3.tar", r"has unbalanced braces; write a range as \{000\.\.003\}"),
        (f"{{0..{'9' * 200}}}.tar", "stands for more than 1,000,000 shards"),
        (f"{{{'9' * 200}..0}}.tar", "stands for more than 1,000,000 shards"),
    ],
)
def test_what_is_wrong_with_a_pattern(root: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=f"^x=.*{message}"):
        expand_urls(pattern, "x")
    with pytest.raises(UserError, match=f"^x=.*{message}"):
        expand_urls(["a.tar", pattern], "x")


def number_of_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a list of open files")
def test_sixty_four_files_are_open_at_most_and_the_oldest_is_closed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(67)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%03d" % number)
    before, files = number_of_open_files(), OpenFiles()
    for number, path in enumerate(paths):
        assert files.read(path, 0, 3) == b"%03d" % number
        assert number_of_open_files() - before == min(64, number + 1)
    for path in paths:
        path.unlink()
    assert files.read(paths[3], 1, 2) == b"03"  # still open
    with pytest.raises(UnreadableError, match="does not exist"):
        files.read(paths[2], 0, 3)
    copy = pickle.loads(pickle.dumps(files))
    with pytest.raises(UnreadableError, match="does not exist"):
        copy.read(paths[3], 0, 3)


def test_bytes_are_read_where_they_are_and_fewer_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(range(100)))
    files = OpenFiles()
    for offset, size in ((90, 5), (0, 3), (3, 2), (98, 10), (200, 1)):
        assert files.read(file, offset, size) == bytes(range(100))[offset : offset + size]
