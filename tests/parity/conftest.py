"""Where the records of the original program are, and how to read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

_BESIDE_THE_PROJECT = Path(__file__).parents[2].parent / "shared" / "parity"


class Records:
    """A folder of recorded behaviour; its README says what each file holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def json(self, name: str) -> Any:
        """A JSON file."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A safetensors file."""
        return load_file(self.folder / name)


@pytest.fixture(scope="session")
def parity() -> Records:
    """The records: `$COGVIEW_PARITY`, or `shared/parity` beside the project; skips where neither exists."""
    folder = Path(os.environ.get("COGVIEW_PARITY", _BESIDE_THE_PROJECT))
    if not (folder / "MANIFEST.json").is_file():
        pytest.skip(f"no records of the original program at {folder}; set COGVIEW_PARITY to their folder")
    return Records(folder)


@pytest.fixture(scope="session")
def text_model(parity: Records) -> Path:
    """The released text tokenizer, beside the records."""
    file = parity.folder.parent / "reference" / "cog-pretrain.model"
    file = Path(os.environ.get("COGVIEW_TEXT_MODEL", file))
    if not file.is_file():
        file = _BESIDE_THE_PROJECT.parent / "reference" / "cog-pretrain.model"
    if not file.is_file():
        pytest.skip(f"no released text tokenizer at {file}; set COGVIEW_TEXT_MODEL to its file")
    return file
