"""Command lines of this program, as a user can paste them into a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_MODULE = ["-m", "cogview_pl.run"]
_PROGRAM = "cogview_pl"
_CONFIG_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")


def config_flags() -> list[str]:
    """Options of this command line that name folders and files of configurations, with their values."""
    words = sys.argv[1:]
    named = [place for place, word in enumerate(words) if word.partition("=")[0] in _CONFIG_FLAGS]
    return [word for place in named for word in words[place : place + (1 if "=" in words[place] else 2)]]


def how_to_resume(run: Path, overrides: Sequence[str] = ()) -> str:
    """Advice to resume a run, with the command that does it.

    The command calls the program as it was called now. It needs no other words, because the run has its configuration.

    Args:
        run: folder of the run.
        overrides: what to change.
    """
    words = [*config_flags(), f"resume={run}", *overrides]
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ:  # the words of the launcher are unknown
        return f"go on with the same launcher and: {shlex.join([*_MODULE, *words])}"
    return f"go on with: {shlex.join([*_program(), *words])}"


def command(words: Sequence[str]) -> str:
    """The command line that calls this program with other words, as a user can paste it into a shell."""
    return shlex.join([*_program(), *config_flags(), *words])


def _program() -> list[str]:
    """The words that called this program: `python -m cogview_pl.run`, or the name of a script."""
    python, *words = sys.orig_argv
    for place, word in enumerate(words):
        if words[place : place + 2] == _MODULE:
            return [python, *words[: place + 2]]
        if Path(word).name == _PROGRAM and not word.startswith("-"):
            found = shutil.which(_PROGRAM)
            return [_PROGRAM if found is not None and os.path.samefile(found, word) else word]
    return ["python", *_MODULE]
