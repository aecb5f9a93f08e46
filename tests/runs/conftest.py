"""The folder that a training run in this process works in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogview_pl.errors.signals import STOP


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, from the folder that it was started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(STOP, "received", None)  # and what a test leaves there is put back
    monkeypatch.setattr(STOP, "deferred", False)
    return Path("run")
