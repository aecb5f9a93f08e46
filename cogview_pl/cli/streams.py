"""Standard output and error that survive what shells do to them, and file names in any language in any locale."""

from __future__ import annotations

import io
import os
import sys


class ForgivingStream(io.TextIOWrapper):
    """A text stream whose reader may go away, as that of `| head -1` does, or whose disk may be full.

    What is written then goes nowhere, and the program goes on.

    Characters that the terminal's encoding lacks are written as escapes.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._mute()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._mute()

    def _mute(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def use_forgiving_streams() -> None:
    """Put them in the place of this process's standard output and error; closed ones become `/dev/null`."""
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
    """Where the locale has no Chinese file names, replace this process by one in Python's UTF-8 mode.

    Python reads names by the locale's encoding, and no library can write what it then makes of Chinese ones. What is
    printed keeps the encoding of the terminal.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":  # if Python does not heed it
        return
    printed = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", printed)
    os.execv(sys.executable, sys.orig_argv)
