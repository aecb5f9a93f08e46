"""The kernels for a GPU compile for Ampere and Hopper on any Linux machine; on Hopper no tiles are spilled."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

MOST_SPILLED = 192
"""Bytes per thread. Triton 3.9 spills 160 in the code search of fp32 vectors, where 3.8 spills none; a kernel whose
tiles do not fit spills thousands."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpus"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert {capability for capability, *_ in found} == {"80", "90"}
    names = {name for _, name, *_ in found}
    assert names == {"linear_of_few_rows", "close_and_open", "attend", "cross_entropies", "_sample", "_nearest"}
    spilling = [line for line in found if line[0] == "90" and int(line[3]) > MOST_SPILLED]
    assert not spilling
