"""Where the records of the original program are, and how to read them.

`records/` beside this file is a part of them, so that any clone can tell (`reduce.py` makes it). All of them are read
from `$COGVIEW_PARITY`, or from `shared/parity` beside the project; only then do the tests run that are marked
`all_records`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

PART = Path(__file__).with_name("records")
_BESIDE_THE_PROJECT = Path(__file__).parents[2].parent / "shared"


def records_folder() -> Path:
    """All records where they are, else the part in the repository."""
    folder = Path(os.environ.get("COGVIEW_PARITY", _BESIDE_THE_PROJECT / "parity"))
    if "COGVIEW_PARITY" in os.environ and not (folder / "transformer").is_dir():
        raise pytest.UsageError(f"COGVIEW_PARITY={folder} holds no records of the original program")
    return folder if (folder / "transformer" / "checkpoint").is_dir() else PART


def text_model_file() -> Path:
    """The released text tokenizer, which is not ours to hand on."""
    return Path(os.environ.get("COGVIEW_TEXT_MODEL", _BESIDE_THE_PROJECT / "reference" / "cog-pretrain.model"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs more than is there; the rest must run."""
    lacking = {"all_records"} if records_folder() == PART else set()
    without_text = not text_model_file().is_file()

    def has_all(item: pytest.Item) -> bool:
        names = {mark.name for mark in item.iter_markers()}
        return not names & lacking and not (without_text and "text_model" in getattr(item, "fixturenames", ()))

    left_out = [item for item in items if not has_all(item)]
    if left_out:
        items[:] = [item for item in items if has_all(item)]
        config.hook.pytest_deselected(items=left_out)


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
    """The records."""
    return Records(records_folder())


@pytest.fixture(scope="session")
def text_model() -> Path:
    """The released text tokenizer."""
    return text_model_file()
