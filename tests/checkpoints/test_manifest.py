"""Manifests: a file is known by its size and hash, and what is not as noted is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cogview_pl.checkpoints.manifest import MANIFEST, file_hash, manifest_hash, require_undamaged, write_manifest
from cogview_pl.errors import UserError

EMPTY = "99aa06d3014798d86001c324468d497f"  # XXH3 of nothing, 128 bits, as its specification has it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "some").write_bytes(b"abc")
    (tmp_path / "Ω").write_bytes(b"")
    write_manifest(tmp_path, ["some", "Ω"])
    return tmp_path


def refusal(folder: Path, *names: str) -> str:
    with pytest.raises(UserError) as error:
        require_undamaged(folder, names)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_manifest_holds_sizes_and_hashes(folder: Path) -> None:
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    assert json.loads(text) == {
        "some": {"bytes": 3, "xxh3_128": "06b05ab6733a618578af5f94892f3950"},
        "Ω": {"bytes": 0, "xxh3_128": EMPTY},
    }
    assert text.startswith('{\n "some": {\n  "bytes": 3,') and '"Ω"' in text and text.endswith("}\n")
    require_undamaged(folder, ["Ω", "some"])
    assert file_hash(folder / "Ω") == EMPTY
    assert manifest_hash(folder) == file_hash(folder / MANIFEST)


def test_files_that_are_not_as_noted(folder: Path) -> None:
    (folder / "new").write_bytes(b"")
    assert refusal(folder, "some", "new") == f"{folder / MANIFEST} does not list new; copy the folder again"
    assert refusal(folder, "gone", "new") == f"{folder / 'gone'} is missing; copy the folder again"
    for content in (b"abd", b"abcd", b""):
        (folder / "some").write_bytes(content)
        require_undamaged(folder, ["Ω"])
        assert refusal(folder, "Ω", "some").startswith(
            f"{folder / 'some'} is damaged: it is not the file that manifest"
        )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", f"{MANIFEST} is damaged (it is no JSON object); copy the folder again"),
        ("{", f"{MANIFEST} is damaged (Expecting property name"),
        ("[" * 200_000, f"{MANIFEST} is damaged ("),
        ("\udcff", f"{MANIFEST} is damaged ("),
        ('{"some": 3}', "some is damaged"),
        ('{"some": {"bytes": 3}}', "some is damaged"),
        ("{}" + " " * ((1 << 20) - 1), f"{MANIFEST} has 1,048,577 bytes"),
        ("{}" + " " * ((1 << 20) - 2), f"{MANIFEST} does not list some"),
    ],
    ids=["list", "cut", "deep", "no text", "a number", "no hash", "too long", "long"],
)
def test_manifests_that_say_nothing(folder: Path, content: str, words: str) -> None:
    (folder / MANIFEST).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert words in refusal(folder, "some")


def test_a_folder_without_a_manifest_is_read_on_request_only(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    message = refusal(folder, "some")
    assert "does not exist, so nothing vouches for the files beside it" in message and "verify=false" in message
