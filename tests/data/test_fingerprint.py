"""A data set's fingerprint is the same in every version, and tells values, their order and files apart."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from cogview_pl.data.fingerprint import Fingerprint


def digest(*lines: bytes) -> str:
    return xxhash.xxh3_128(b"".join(lines)).hexdigest()


def test_it_is_that_of_lines_of_json(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"12345")
    os.utime(file, ns=(0, 7_000_000_001))
    found = Fingerprint("folder")
    lines = [b'["folder"]\n']
    assert found.hexdigest() == digest(*lines)
    found.add(8, 0.5, "a", None, {"b": 1, "a": [True]})
    lines.append(b'[8, 0.5, "a", null, {"a": [true], "b": 1}]\n')
    found.add_file(file, "key", "caption")
    lines.append(b'["key", "caption", [5, 7000000001]]\n')
    found.add_file(tmp_path / "gone.png", "other")
    lines.append(b'["other", null]\n')
    found.add_file(tmp_path / "a\0.png")
    lines.append(b'["has no name that a file can have"]\n')
    found.add_bytes(b"\x00\xff")
    lines += [b"[2]\n", b"\x00\xff"]
    assert found.hexdigest() == digest(*lines)
    assert found.hexdigest() == "78d58471c0102be0b1409a5164ff7d6e"


def test_what_is_cut_elsewhere_is_something_else() -> None:
    found = set()
    for parts in (("a", "b"), ("ab",), ("b", "a"), ("a", "b", "")):
        fingerprint = Fingerprint("x")
        for part in parts:
            fingerprint.add_bytes(part.encode())
        found.add(fingerprint.hexdigest())
        fingerprint = Fingerprint("x")
        fingerprint.add(*parts)
        found.add(fingerprint.hexdigest())
    assert len(found) == 8
    assert Fingerprint("x").hexdigest() != Fingerprint("y").hexdigest()
