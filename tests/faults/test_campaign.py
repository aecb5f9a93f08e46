"""A short fault campaign; `nox -s faults` runs the full one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_runs_survive_what_is_done_to_them() -> None:
    """Two faults of each kind, in a process of its own that the runs are forked from."""
    command = [sys.executable, "-m", "tests.faults.campaign", "--each", "2", "--seed", "7"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-3000:]
