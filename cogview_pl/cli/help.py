"""`--help` and `--version`, without composing a configuration."""

from __future__ import annotations

import string
from collections.abc import Sequence

import cogview_pl
from cogview_pl.config.shipped import experiments, shipped

_TEXT = "help.txt"
_NO_CHOICES = ("hydra/", "task_on_data")  # groups that are no choices of a run


def help_or_version(words: Sequence[str]) -> str | None:
    """What `--help`, `-h` or `--version` prints; None if no word asks for it."""
    if "--help" in words or "-h" in words:
        return help_text()
    return version_text() if "--version" in words else None


def help_text() -> str:
    """`conf/help.txt` with the groups and their choices."""
    choices: dict[str, set[str]] = {"experiment": set(experiments())}
    for file in shipped("conf").glob("*/**/*.yaml"):
        choices.setdefault(file.parent.relative_to(shipped("conf")).as_posix(), set()).add(file.stem)
    lines = "\n".join(
        f"  {group}: {', '.join(sorted(names))}"
        for group, names in sorted(choices.items())
        if not group.startswith(_NO_CHOICES)
    )
    text = (shipped("conf") / _TEXT).read_text(encoding="utf-8")
    return string.Template(text).substitute(groups=lines)


def version_text() -> str:
    """Name and version of this package."""
    return f"cogview_pl {cogview_pl.__version__}"
