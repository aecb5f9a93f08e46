"""Code blocks of docs/write-your-own-task.md, so that tests run the text of the tutorial."""

from __future__ import annotations

import re
from pathlib import Path

TUTORIAL = Path(__file__).parents[2] / "docs" / "write-your-own-task.md"


def block(heading: str, language: str) -> str:
    """The first code block in a language, in the section with the heading."""
    section = TUTORIAL.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]
