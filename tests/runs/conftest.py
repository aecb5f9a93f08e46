"""Fixture: the working folder of a training run in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogview_pl.errors.signals import SIGNALS


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run, relative to its working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SIGNALS, "received", None)  # restored after the test
    monkeypatch.setattr(SIGNALS, "deferred", False)
    return Path("run")
