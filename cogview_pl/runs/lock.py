"""Lock of a run folder, so that one run uses it at a time. The lock ends with the process that holds it."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
from pathlib import Path
from typing import TextIO

from cogview_pl.durable.write import disk_full_named, no_links
from cogview_pl.errors import UserError

_log = logging.getLogger(__name__)

LOCK = ".lock"


class RunLock:
    """The lock of a run folder, held from construction to `release` or the end of the process.

    It is a record lock (`lockf`). Unlike `flock`, forked workers do not keep it after their parent was killed, so the
    run can be resumed at once.

    Args:
        folder: an existing folder.

    Raises:
        UserError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / LOCK
        self._stream: TextIO | None = None
        while self._stream is None:
            stream = self._open()
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                stream.close()
                raise UserError(
                    f"{folder} is in use by {holder}, which is alive; wait for it or stop it, or choose another run_dir"
                ) from None
            except OSError as error:
                _log.warning("%s: locks do not work here (%s); see to it that only one run uses it", folder, error)
                stream.close()
                return
            if self._is_current(stream):
                self._stream = stream
            else:  # the holder deleted the file after it was opened here
                stream.close()
        with disk_full_named(self._file):
            self._stream.truncate(0)
            self._stream.write(f"process {os.getpid()} on {platform.node()}\n")
            self._stream.flush()

    def _open(self) -> TextIO:
        try:
            return open(self._file, "a+", encoding="utf-8", opener=no_links)
        except OSError as error:
            if not self._file.is_symlink():
                raise
            raise UserError(f"{self._file} is a link, and a run does not write through it; delete it") from error

    def release(self) -> None:
        """Release the lock."""
        if self._stream is not None:
            self._file.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None

    def _is_current(self, stream: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self._file.stat())
        except FileNotFoundError:
            return False
