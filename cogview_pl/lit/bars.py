"""Progress of long loops: a bar on a terminal; in a file or a pipe, one line now and then.

Both are shown where messages of level INFO are, so the other processes of a run are silent.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

_log = logging.getLogger(__name__)

TERMINAL_SECONDS = 0.25
"""Time between two drawings of a bar on a terminal."""
FILE_SECONDS = 30.0
"""Time between two lines in a file or a pipe."""

_WIDE = 120  # columns from which a bar also shows the time since its start and the speed
_NARROW_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt:>DIGITS}/{total_fmt} {unit}{postfix}, {remaining} left"
_WIDE_FORMAT = _NARROW_FORMAT.replace("{remaining} left", "{elapsed} gone, {remaining} left, {rate_fmt}")

_told: set[str] = set()


class Bar:
    """Progress of a loop, as a context.

    Args:
        name: what the loop does, such as `train`.
        total: number of units of the whole loop; None if it is not known.
        unit: their name in the plural, such as `steps`.
        done: number of units that an earlier process has done.
        terminal_seconds, file_seconds: time between two drawings, and between two lines.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        terminal_seconds: float = TERMINAL_SECONDS,
        file_seconds: float = FILE_SECONDS,
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._first = done
        self._started = self._shown = time.monotonic()
        shown, terminal = _log.isEnabledFor(logging.INFO), on_terminal()
        self._interval = terminal_seconds if terminal else file_seconds
        self._lines = shown and not terminal
        self._bar: _TerminalBar | None = None
        if shown and terminal:
            self._bar = _TerminalBar(
                desc=name, total=total, unit=unit, initial=done, position=0, leave=False, file=sys.stderr
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(keep=error is not None)

    def update(self, count: int = 1) -> None:
        """Count further units."""
        self.reach(self.done + count)

    def reach(self, done: int, note: Callable[[], str] = lambda: "") -> None:
        """Set the number of finished units.

        Args:
            done: finished units.
            note: text behind the numbers; it is called only when it is shown, as losses are on another device.
        """
        self.done = done
        now = time.monotonic()
        if now - self._shown < self._interval:
            return
        self._shown = now
        if self._bar is not None:
            self._bar.set_postfix_str(note(), refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif self._lines:
            _log.info("%s", self._line(note(), now))

    def close(self, *, keep: bool = False) -> None:
        """Remove the bar from the terminal, or keep it there as the place where an error came."""
        if self._bar is not None:
            self._bar.n, self._bar.leave = self.done, keep
            self._bar.close()
            sys.stderr.flush()  # its last carriage return comes before what standard output says next

    def _line(self, note: str, now: float) -> str:
        parts = [f"{self.name}: {self.done:,}{(self.total and f' of {self.total:,}') or ''} {self.unit}", note]
        rate = (self.done - self._first) / (now - self._started)
        if self.total and rate:
            parts.append(f"{tqdm.format_interval(max(0, self.total - self.done) / rate)} left")
        return ", ".join(filter(None, parts))


class _TerminalBar(tqdm):  # type: ignore[type-arg]
    @property
    def format_dict(self) -> dict[str, Any]:
        """Values of the bar; the width is asked for at each drawing, as terminals change theirs."""
        columns = terminal_width()
        shape = _WIDE_FORMAT if columns >= _WIDE else _NARROW_FORMAT
        shape = shape.replace("DIGITS", str(len(str(self.total))))  # the bar keeps its length
        return {**super().format_dict, "ncols": columns, "bar_format": shape}


def status(text: str) -> None:
    """Say what is happening before there is anything to count: a line that the next output replaces.

    In a file or a pipe it is a line of its own, and comes once.
    """
    if not _log.isEnabledFor(logging.INFO):
        return
    if on_terminal():
        sys.stderr.write(f"\r{text[: terminal_width() - 1]}\x1b[K")
        sys.stderr.flush()
    elif text not in _told:
        _told.add(text)
        _log.info("%s", text)


def on_terminal() -> bool:
    """Whether standard error is a terminal, on which a line can be replaced."""
    return sys.stderr is not None and sys.stderr.isatty()


def terminal_width() -> int:
    """Columns of the terminal of standard error; `COLUMNS`, else 80, where it reports none."""
    with suppress(OSError, ValueError, AttributeError):
        if columns := os.get_terminal_size(sys.stderr.fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns
