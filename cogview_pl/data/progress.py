"""How a data set reports its progress while it finds and indexes files: it is given something that makes bars."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol


class Progress(AbstractContextManager["Progress"], Protocol):
    """Counts the units of a loop that have been done, as a context."""

    def update(self, count: int = 1) -> None:
        """Count further units."""


NewProgress = Callable[[str, "int | None", str], Progress]
"""Makes a `Progress` from what the loop does, its number of units (None: unknown), and their name in the plural."""


class Silent(Progress):
    """Shows nothing."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass
