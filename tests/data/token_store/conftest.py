"""The token store that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from .stores import tokenize


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tokenize(tmp_path / "token_store")
    return tmp_path / "token_store"
