"""Progress bars on a terminal of any width, and their lines in a file."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
from collections.abc import Callable, Iterator

import pytest

from cogview_pl.lit import bars
from cogview_pl.lit.bars import Bar, status


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[int], list[str]]]:
    """Shows a finished loop of three images on a terminal of that width; returns the drawings of the bar."""
    caplog.set_level("INFO")
    monkeypatch.delenv("COLUMNS", raising=False)
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:

        def show(columns: int) -> list[str]:
            monkeypatch.setattr(sys, "stderr", stream)
            fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            status("reading …")
            with Bar("tokenize", 3, "images", done=1, terminal_seconds=0) as bar:
                bar.update()
                bar.reach(3, lambda: "loss 0.5000")
            found = b""
            while select.select([reader], [], [], 0.1)[0]:
                found += os.read(reader, 10_000)
            return found.decode().split("\r")

        yield show
    os.close(reader)


@pytest.mark.parametrize(("columns", "width"), [(40, 40), (80, 80), (120, 120), (0, 80)])
def test_a_bar_fills_the_terminal(columns: int, width: int, terminal: Callable[[int], list[str]]) -> None:
    """A terminal that reports no width is taken for one of 80 columns."""
    empty, reading, *drawings = terminal(columns)
    assert (empty, reading) == ("", "reading …\x1b[K")
    bars_drawn = [drawing for drawing in drawings if drawing.strip()]
    assert {len(drawing) for drawing in bars_drawn} == {width}
    assert bars_drawn[0].startswith("tokenize  33%|") and bars_drawn[-1].startswith("tokenize 100%|")
    assert "3/3 images, loss 0.5000" in bars_drawn[-1] or columns == 40
    assert all(("images/s" in drawing) == (width == 120) for drawing in bars_drawn[1:])
    assert not drawings[-2].strip() and not drawings[-1]  # it is gone, and its line is free


def test_the_bar_stays_where_an_error_came(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level("INFO")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyError), Bar("train", 3, "steps", terminal_seconds=0) as bar:
        bar.update()
        raise KeyError
    last = stream.getvalue().split("\r")[-1]
    assert "1/3 steps" in last and last.endswith("\n")


def test_a_file_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    with Bar("train", 2000, "steps", done=1000, file_seconds=30) as bar:
        for done in range(1001, 2001):
            now[0] += 0.07
            bar.reach(done, lambda: "loss 0.5000")
    assert caplog.messages == [
        "train: 1,429 of 2,000 steps, loss 0.5000, 00:39 left",
        "train: 1,858 of 2,000 steps, loss 0.5000, 00:09 left",
    ]


def test_what_is_happening_stands_once_in_a_file(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "_told", set())
    status("indexing …")  # the other processes of a run are silent
    caplog.set_level("INFO")
    for _ in range(2):
        status("indexing …")
    assert caplog.messages == ["indexing …"]
