"""A saved model for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from .saved import save_run, save_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a saved sequence model."""
    return save_run(tmp_path / "run", save_tokenizer(tmp_path / "tokenizer" / "model"))
