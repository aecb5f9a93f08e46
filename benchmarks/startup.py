"""Start-up time of commands in milliseconds."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.contest import contest
from benchmarks.report import Result, Row, result


def rows() -> list[Row]:
    """One row."""
    return [Row("startup:commands", measure)]


def measure(rounds: int = 5) -> Result:
    """Time of importing the package, of `--help`, and of an unknown key."""
    run = [sys.executable, "-m", "cogview_pl.run"]
    commands = {
        "import": [sys.executable, "-c", "import cogview_pl"],
        "--help": [*run, "--help"],
        "unknown key": [*run, "task=pretrain", "no_such_key=1"],
    }
    quiet = partial(subprocess.run, capture_output=True, check=False)
    return result("ms", contest({name: partial(quiet, command) for name, command in commands.items()}, rounds), {})
