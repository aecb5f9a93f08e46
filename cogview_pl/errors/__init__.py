"""The exception for errors that the user can fix."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input or configuration.

    The message is one line: it names the key or file, the value found, and a remedy. The command line prints it and
    exits with code 2. Other exceptions are bugs and keep their traceback.

    Args:
        message: the line.
        overrides: what to change when the run goes on, for the command in `advice`.
        details: lines that the command line prints below the message, where one line cannot say what to do.
    """

    def __init__(self, message: str, *, overrides: Sequence[str] = (), details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.overrides = tuple(overrides)
        self.details = tuple(details)
        self.advice: str | None = None
        """How the run goes on: a sentence with a whole command. None: it cannot."""
