"""The folder that a training run in this process works in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogview_pl.errors.signals import SIGNALS


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, from the folder that it was started in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SIGNALS, "received", None)  # and what a test leaves there is put back
    monkeypatch.setattr(SIGNALS, "deferred", False)
    return Path("run")
