"""Lock of a run folder, so that one run uses it at a time. The lock ends with the process that holds it."""

from __future__ import annotations

import logging
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from weakref import WeakSet

from filelock import lock_descriptor

from cogview_pl.durable.write import disk_full_named, no_links
from cogview_pl.errors import UserError

_log = logging.getLogger(__name__)

LOCK = ".lock"


class RunLock:
    """The lock of a run folder, held from construction to `release` or the end of the process.

    The lock is on the first byte of a file, and the holder is named after it: Windows lets nobody else read a locked
    byte. Forked workers do not keep the lock after their parent was killed, so the run can be resumed at once.

    Args:
        folder: an existing folder.

    Raises:
        UserError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / LOCK
        self._stream: BinaryIO | None = None
        while self._stream is None:
            stream = self._open()
            try:
                locked = lock_descriptor(stream.fileno(), blocking=False)
            except OSError as error:
                _log.warning("%s: locks do not work here (%s); see to it that only one run uses it", folder, error)
                stream.close()
                return
            if not locked:
                stream.seek(1)
                holder = stream.read().decode("utf-8", "replace").strip() or "another process"
                stream.close()
                raise UserError(
                    f"{folder} is in use by {holder}, which is alive; wait for it or stop it, or choose another run_dir"
                )
            if self._is_current(stream):
                self._stream = stream
            else:  # the holder deleted the file after it was opened here
                stream.close()
        _HELD.add(self)
        with disk_full_named(self._file):
            self._stream.truncate(0)
            self._stream.write(f" process {os.getpid()} on {platform.node()}\n".encode())
            self._stream.flush()

    def _open(self) -> BinaryIO:
        try:
            return open(self._file, "a+b", opener=no_links)
        except OSError as error:
            if not self._file.is_symlink():
                raise
            raise UserError(f"{self._file} is a link, and a run does not write through it; delete it") from error

    def release(self) -> None:
        """Release the lock."""
        if self._stream is None:
            return
        with suppress(PermissionError):  # Windows deletes no open file; elsewhere a closed one may be another run's
            self._file.unlink(missing_ok=True)
        self._stream.close()
        self._stream = None
        if os.name == "nt":
            with suppress(PermissionError):  # the next holder has opened it
                self._file.unlink(missing_ok=True)

    def leave_to_parent(self) -> None:
        """In a forked process: close the file, which would keep the lock; the parent still holds it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _is_current(self, stream: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self._file.stat())
        except FileNotFoundError:
            return False


_HELD: WeakSet[RunLock] = WeakSet()


def _leave_locks_to_parent() -> None:
    for lock in list(_HELD):
        lock.leave_to_parent()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_leave_locks_to_parent)
