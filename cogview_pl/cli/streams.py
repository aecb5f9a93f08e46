"""Output streams that survive a closed pipe or a full disk, and file names in any language under any locale."""

from __future__ import annotations

import io
import os
import sys

_ERASE_LINE = "\r\x1b[K"


class ForgivingStream(io.TextIOWrapper):
    """A text stream that drops its output once its reader has gone (`| head -1`) or its disk is full.

    On a terminal, text does not follow a progress bar on the same line: it replaces the bar.
    """

    bar_is_open = False
    """Whether the last line of the terminal is a progress bar, which all its streams share."""

    def write(self, text: str) -> int:
        try:
            if text and self.isatty():
                self._leave_the_bar(text)
            return super().write(text)
        except OSError:
            self._mute()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._mute()

    def _leave_the_bar(self, text: str) -> None:
        """Erase a bar before other text; a bar begins with a carriage return and ends without a newline."""
        if ForgivingStream.bar_is_open and not text.startswith(("\r", "\n")):
            super().write(_ERASE_LINE)
        last = text.rpartition("\n")[2]
        ForgivingStream.bar_is_open = last.startswith("\r") and last.rstrip(" ") != "\r"

    def _mute(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def use_forgiving_streams() -> None:
    """Replace standard output and error; a closed one becomes `/dev/null`.

    Characters that the terminal's encoding lacks are written as escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for the life of the process
        elif type(stream) is io.TextIOWrapper:
            forgiving = ForgivingStream(
                stream.detach(), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
            )
            setattr(sys, name, forgiving)


def use_utf8_file_names() -> None:
    """Under a locale without UTF-8, replace this process by one in Python's UTF-8 mode.

    Python decodes file names with the encoding of the locale, and libraries cannot write Chinese names that it decodes
    wrongly. Output keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":  # the mode may have no effect
        return
    printed = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", printed)
    os.execv(sys.executable, sys.orig_argv)
