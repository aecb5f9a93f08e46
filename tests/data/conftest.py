"""Shards that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from .shards import numbered, write_tar


@pytest.fixture
def three_shards(tmp_path: Path) -> Path:
    for shard in range(3):
        write_tar(tmp_path / f"set-{shard:03d}.tar", numbered(10 * shard, 10 * shard + 10))
    return tmp_path
