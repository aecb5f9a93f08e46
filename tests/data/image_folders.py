"""Image folders for tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogview_pl.data.image_folders.layout import read_folder
from cogview_pl.data.image_folders.listed import Fields, Listed

PATTERNS = ("{text}的{style}图像", "{style}风格的{text}")


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def captions(root: Path | str, field: str | None = None) -> list[tuple[str, str]]:
    """File and first caption of each image."""
    return [(image.file, next(iter(image.captions), "")) for image in listed(root, caption=field)]


def listed(root: Path | str, listing: str | None = None, **fields: Any) -> list[Listed]:
    return list(read_folder(Path(root), Fields(**fields), listing, "data.root").images)


def folder(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(root / name)
    return root


def listing(root: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    (root / name).write_text(content, encoding=encoding)
    return root


def linked(path: Path) -> Path:
    """A link to itself."""
    path.symlink_to(path.name)
    return path


def piped(root: Path, name: str) -> Path:
    os.mkfifo(root / name)
    return root


def holes(root: Path, name: str) -> Path:
    """A file of a terabyte of zeros, which is on no disk."""
    with (root / name).open("wb") as stream:
        stream.truncate(2**40)
    return root


def captioned(root: Path, names: list[str]) -> Path:
    return listing(folder(root, names), "captions.csv", "file_name,text\n" + "".join(f"{n},图{n}\n" for n in names))
